# %% [markdown]
# # Make a film
#
# From a prompt to an MP4, with the small model that is in the repository. Run it as a script
# (`python examples/make_a_film.py`, under a minute on one CPU core) or cell by cell in an editor that knows `# %%`.
# Everything it writes is in `outputs/make_a_film/`.

# %%
from pathlib import Path

import numpy as np

from arlon import ArlonPipeline
from pipelines.deliver.sheet import SheetRow, film_sheet, frames_to_sheet, write_sheet

OUTPUT = Path("outputs/make_a_film")
OUTPUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Two prompts, one take
#
# Opening a model reads its sizes and checks its files; weights are loaded when the first film is made and then stay.
# Prompts follow each other with `continue`: objects carry over, and only what the next prompt words differently
# changes.

# %%
pipe = ArlonPipeline.from_pretrained("shapes", num_threads=1)
prompts = [f"a large {colour} circle moves left on a black background" for colour in ("red", "green")]
film = pipe(prompts, seconds=4, seed=7)
print(f"{len(film.frames)} frames of {film.frames.shape[1:]}, {film.fps:g} a second, seed {film.seed}")

# %% [markdown]
# Durations are rounded to whole segments; `plan` tells the frames of every shot before anything is made.

# %%
for span in film.plan.shots:
    print(f"shot {span.shot}: frames {span.start_frame} to {span.start_frame + span.num_frames - 1}")

# %% [markdown]
# A saved film holds its own recipe: `arlon inspect film.mp4 --storyboard` prints it, and the contact sheet reads the
# prompts from it.

# %%
path = film.save(OUTPUT / "film.mp4")
write_sheet(film_sheet(path), OUTPUT / "film.png")
print(f"{path}: {path.stat().st_size / 1000:.0f} kB")

# %% [markdown]
# ## A storyboard
#
# The same values as in a YAML file. A `cut` starts afresh, and every shot has its own duration. The same storyboard,
# seed and settings give the same frames, here and with `arlon generate`.

# %%
storyboard = {
    "seed": 2,
    "shots": [
        {"prompt": "a large red square stays still on a black background", "duration": 3},
        {"prompt": "a small yellow star moves up on sand", "duration": 3, "transition": "cut"},
    ],
}
plan = pipe.plan(storyboard)
print(f"{plan.num_frames} frames in {len(plan.segments)} segments of {len(plan.takes)} takes")

# %% [markdown]
# ## Frames while the film is made
#
# `stream` gives each segment as soon as it is ready, so a long film need not fit into memory.

# %%
rows = []
for segment in pipe.stream(storyboard):
    times = np.linspace(0, len(segment.frames) - 1, 8).astype(int)
    title = f"segment {segment.index}, from frame {segment.start_frame}: {segment.prompt}"
    rows.append(SheetRow(title=title, frames=segment.frames[times]))
    print(title)
write_sheet(frames_to_sheet(rows), OUTPUT / "segments.png")

# %% [markdown]
# ## Steps and solvers
#
# The solver and the number of steps are options of a film. `midpoint` asks for two velocities a step, so five of its
# steps cost as much as ten of Euler's.

# %%
rows = []
for solver, steps in (("euler", 2), ("euler", 10), ("midpoint", 5)):
    made = pipe(
        prompts[0],
        seconds=3,
        seed=7,
        solver=solver,
        num_inference_steps=steps,
        progress=False,
    )
    times = np.linspace(0, len(made.frames) - 1, 8).astype(int)
    rows.append(SheetRow(title=f"{solver}, {steps} steps", frames=made.frames[times]))
write_sheet(frames_to_sheet(rows), OUTPUT / "solvers.png")
print(f"look at {OUTPUT}/film.png, segments.png and solvers.png")
