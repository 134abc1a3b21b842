"""The documentation's settings. The README is its first page, and links lead from file to file as in the checkout.

    pip install -c constraints.txt -e '.[docs]' && sphinx-build -W --keep-going -j auto -c docs . docs/_build

runs the tutorials and writes the site to ``docs/_build/index.html``.
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pages
from pyro_ae import __version__

project, author, release = "pyro_ae", "The pyro_ae authors", __version__
copyright = f"{author}. Licence: Apache-2.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
root_doc = "README"
include_patterns = [
    *("README.md", "CHANGELOG.md", "docs/*.md", "docs/*/*.md", "docs/*/*.rst"),
    *("tutorials/*.py", "tutorials/bayesian_autoencoder/tutorial.py", "tutorials/bayesian_autoencoder/README.md"),
    "tests/benchmarks/README.md",
]
exclude_patterns = ["docs/_build"]

# A tutorial is a script in cells, run from the top in a process of its own. A failure is an error, a word on stderr a
# warning.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_output_stderr = "remove-warn"
nb_merge_streams = True
os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore:IProgress"  # ArviZ on its next version, tqdm on widgets
os.environ.pop("MPLBACKEND", None)  # figures go into the pages
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tutorials run at once

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False  # of torch, such as what forward() is
autodoc_preserve_defaults = True
autodoc_mock_imports = ["anndata", "mlflow", "tensorboard", "wandb"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
nitpicky = True  # a role in a docstring that leads nowhere is a mistake; types of other libraries lead out of here
nitpick_ignore_regex = [("py:class", ".*"), ("py:obj", ".*"), ("py:meth", r"torch\..*")]

html_theme = "furo"
html_title = "pyro_ae"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
linkcheck_anchors = False


def _navigation(app, docname, source):
    if docname == root_doc:
        source[0] += pages.NAVIGATION


def _spread(app, env, docnames):
    """Tutorials take long, and a process reads pages in their order: they are spread evenly among all."""
    slow = [name for name in docnames if name.startswith("tutorials/")]
    rest = [name for name in docnames if name not in slow]
    share = len(rest) // max(len(slow), 1)
    for i, name in enumerate(slow):
        rest.insert(i * (share + 1), name)
    docnames[:] = rest


def _references(app, what, name, thing, options, lines):
    """Each title under References on a line of its own."""
    lines[:] = pages.listed(lines)


def _skip(app, what, name, thing, skip, options):
    """Fields of a named tuple are told by its arguments."""
    return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field") else None


def _first_page(app, error):
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app):
    app.connect("builder-inited", lambda app: pages.write(Path(app.confdir)))
    app.connect("env-before-read-docs", _spread)
    app.connect("source-read", _navigation)
    app.connect("autodoc-process-docstring", _references, priority=400)
    app.connect("autodoc-skip-member", _skip)
    app.connect("build-finished", _first_page)
