"""Settings: every one that can be made is written and read back the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arlon.film.settings import NEWER_SETTINGS, X264_PRESETS, Settings

settings = st.builds(
    Settings,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    num_threads=st.integers(1, 512),
    ar_temperature=st.floats(0, 10),
    ar_top_p=st.floats(0.01, 1),
    ar_guidance_scale=st.floats(0, 20),
    crf=st.integers(0, 51),
    preset=st.sampled_from(X264_PRESETS),
    vae_blend_frames=st.integers(0, 8),
    vae_tile=st.none() | st.integers(8, 512).map(lambda n: 8 * n),
    vae_micro_batch=st.none() | st.integers(1, 64),
    text_dtype=st.sampled_from(["float32", "bfloat16"]),
    x264_cpu_independent=st.booleans(),
)


@given(settings)
def test_settings_are_read_back(chosen: Settings) -> None:
    assert Settings.from_plain(chosen.to_plain()) == chosen


@given(settings)
def test_settings_that_the_first_films_lacked_are_written_only_if_they_matter(chosen: Settings) -> None:
    written = chosen.to_plain()
    for name, value in NEWER_SETTINGS.items():
        assert (name in written) == (getattr(chosen, name) != value)
