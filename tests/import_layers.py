"""Layers of the packages, and a checker that finds imports that run upwards or in a circle.

An import counts wherever it is: at the top of a file, inside a function, or for type checkers alone. A text such as
"arlon.models.ar:CodeTransformer" in a table of plug-ins is no import: other packages add such rows too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, frozenset[str]]
"""Modules that each module imports, all by their full names."""

LAYERS = {
    "arlon": """
        errors files grids memory precision threads version protocols stored_form
        config hub plugins
        components
        attention text
        models
        registry cost
        checkpoint
        diffusion
        backbones
        shapes
        data
        evaluation film
        pipeline
    """,
    "arlon.attention": """
        kernels
        layer
    """,
    "arlon.text": """
        cleaning interface prompts
        sources
        encoders
    """,
    "arlon.models": """
        ar codebook embeddings spatial_vae temporal_vae uncertainty video_pieces vqvae_layers
        code_sampling layers video_vae vqvae
        chunking
        stdit
        injection_designs pixart
        injection
    """,
    "arlon.diffusion": """
        flow guidance references solvers steps
        denoiser samplers
        conditioning
    """,
    "arlon.backbones": """
        base
        stdit3
    """,
    "arlon.film": """
        appearance settings strict_yaml
        storyboard_values geometry
        storyboard
        plan
        media prompt_schedule prepare record
        take_media container
        messages
        schedule workers
        encode_media make
    """,
    "arlon.data": """
        aspect mp4 pictures transforms
        datasets video_io
        latent_cache
        manifest samples
        buckets video_clips
        bucketed_clips
    """,
    "arlon.shapes": """
        world
        captions matching
        prompt_reader tracking
        motion
        oracle
    """,
    "arlon.evaluation": """
        metrics metric_table optical_flow vbench cases
        film
    """,
    "arlon.evaluation.vbench": """
        network_files rules
        networks
    """,
    "stages": """
        config muon pictures registry vae_objectives
        flow_matching optim parallel record
        assemble callbacks data
        common
        ar dit inject train vae vqvae
    """,
    "pipelines": """
        store
        deliver
        executors
        runs
        batch doctor
        evaluation
        commands
        cli
    """,
    "pipelines.store": """
        lock run_folder
        media
    """,
    "pipelines.deliver": """
        paths
        hls sheet
    """,
    "pipelines.executors": """
        write
        local ray_graph
    """,
    "pipelines.runs": """
        prepare picture inspect
        run_record
        generate resume
        edit verify status
        progress_view
    """,
    "pipelines.batch": """
        batch
        ray_batch
    """,
    "pipelines.doctor": """
        film_cost
        machine
        film_fit
        diagnosis
    """,
    "pipelines.evaluation": """
        film_set plots
        report vbench_export
        evaluate
    """,
    "pipelines.commands": """
        common options
        generate plan status verify fork inspect sheet batch doctor evaluate
        resume redo extend
    """,
}
"""The members of each package, lowest layer first. A member may import members on the lines above its own."""


def import_graph(root: Path, packages: Iterable[str]) -> Graph:
    """Read the imports of all modules of some packages.

    Args:
        root: Folder that holds the packages.
        packages: Their names.
    """
    files = {file.relative_to(root): file for package in packages for file in sorted((root / package).rglob("*.py"))}
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): file for path, file in files.items()}
    return {
        name: frozenset(_imported(file.read_text(encoding="utf-8"), modules.keys())) - {name}
        for name, file in modules.items()
    }


def _imported(source: str, modules: Iterable[str]) -> Iterator[str]:
    """Those of `modules` that a source text imports; of a package and a module in it, the module."""
    known = set(modules)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:  # a class or function: what holds it is what is imported
                name = name.rpartition(".")[0]
            if name:
                yield name


def layer_problems(graph: Graph, layers: Mapping[str, str] = LAYERS) -> list[str]:
    """Imports that run upwards or sideways, and modules that are in no layer, one sentence each."""
    ranks = {
        package: {name: rank for rank, line in enumerate(table.strip().splitlines()) for name in line.split()}
        for package, table in layers.items()
    }
    problems = []
    for module in sorted(graph):
        package, _, name = module.rpartition(".")
        if package in ranks and name not in ranks[package]:
            problems.append(f"{module} is in no layer of {package}: add it to LAYERS")
    for importer, imported in ((a, b) for a in sorted(graph) for b in sorted(graph[a])):
        for package, rank in ranks.items():
            if not importer.startswith(f"{package}.") or not f"{imported}.".startswith(f"{package}."):
                continue
            # The members of the package that hold the two modules; empty for the package itself.
            above, below = (f"{name}.".removeprefix(f"{package}.").partition(".")[0] for name in (importer, imported))
            if above == below or above not in rank or (below and below not in rank):
                continue  # inside one member, which may have layers of its own, or reported above
            if not below or rank[below] >= rank[above]:
                problems.append(f"{importer} imports {imported}, which is not below it in {package}")
    return problems


def circles(graph: Graph) -> list[str]:
    """Circles of imports between modules, such as `a -> b -> a`; empty if, and only if, there is none."""
    edges = {importer: sorted(imported & graph.keys()) for importer, imported in graph.items()}
    found: list[str] = []
    finished: set[str] = set()
    for start in sorted(edges):
        # Depth-first search: `path` is the chain of imports that leads to the module at hand.
        path: list[str] = []
        stack = [(start, iter([start]))]
        while stack:
            module = next(stack[-1][1], None)
            if module is None:
                stack.pop()
                if path:
                    finished.add(path.pop())
            elif module in path:
                found.append(" -> ".join([*path[path.index(module) :], module]))
            elif module not in finished:
                path.append(module)
                stack.append((module, iter(edges[module])))
    return found
