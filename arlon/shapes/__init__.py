"""Shapes world: the toy domain of plain objects in motion that the small default model is trained on and tested with.

Everything about it is in this package and nowhere else in the library: renderer (`world`), captions and their parser
(`captions`, `prompt_reader`), and the oracle that reads films back (`oracle`, `tracking`, `motion`, `matching`). The
training takes (`arlon.data.datasets.ShapesTakes`) and the test cases (`arlon.evaluation.cases`) are made from it. Who
came for ARLON itself can skip it.
"""
