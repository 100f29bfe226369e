"""Sphinx configuration. Imports nothing of the project itself and fetches nothing; a notebook is shown as it was saved."""

import importlib.metadata
import shutil
from pathlib import Path

HERE = Path(__file__).parent

# Sphinx reads below this folder only, and the notebooks live beside it.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
if (HERE.parent / "notebooks").is_dir():
    shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))

project = "lingualinked"
author = "The lingualinked developers"
copyright = author
release = importlib.metadata.version(project)

extensions = ["myst_nb", "numpydoc", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make notebooks` executes them

autodoc_member_order = "bysource"
autodoc_typehints = (
    "none"  # the numpydoc sections give types, with shapes and units; links to torch would need a network
)
numpydoc_show_class_members = False  # autodoc lists them
default_role = "code"  # `name` in a docstring is code, as ``name`` is
