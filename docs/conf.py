"""The site of these pages: Sphinx, Markdown through MyST, the library's reference from its docstrings.

``make docs`` builds it into outputs/docs. It asks no network, and what it builds loads nothing from one.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import runpy
import sys
import warnings
from pathlib import Path
from unittest import mock

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
OURS = ("adapters", "client", "conf", "gradcodec", "server", "strategies", "tasks", "tgap")
sys.path.insert(0, str(ROOT))

project = "CG-FedLLM"
copyright = "the authors of CG-FedLLM. Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
html_show_sphinx = False
html_copy_source = False
highlight_language = "none"
myst_heading_anchors = 3
nitpick_ignore = [("py:class", "adapters.team.Item")]  # a type variable
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


class Help(SphinxDirective):
    """What a program says of itself: ``{help} MODULE [SUBCOMMAND]``. Its docstring, and its ``--help``."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, *subcommand = self.arguments
        name = module if (ROOT / f"{module.replace('.', '/')}.py").is_file() else f"{module}.__main__"
        source = ROOT / f"{name.replace('.', '/')}.py"
        said, printed = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "", io.StringIO()
        with (
            mock.patch.object(sys, "argv", [f"python -m {module}", *subcommand, "--help"]),
            mock.patch.dict(os.environ, {"COLUMNS": "122"}),
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
            warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # that another one imported it before
        ):
            runpy.run_module(name, run_name="__main__")
        options = printed.getvalue().strip()
        if not subcommand and said not in options:
            options = said + "\n\n" + options.replace("\n" + said.split("\n")[0] + "\n", "")
        self.env.note_dependency(str(source))
        return [nodes.literal_block(options, options, language="none")]


def as_we_write(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Where our docstrings mean something else than Sphinx does."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # what stands before a colon is no type
    if what == "module":  # indented text is a table or a command, and shown as it stands
        before = [""]
        for line in [*lines]:
            begins = line.startswith("    ") and not any(one.startswith("    ") for one in before[-2:])
            before += ["::", "", line] if begins and not before[-1] else [line]
        lines[:] = before[1:]


def foreign(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement) -> nodes.Node | None:
    """Names of other projects have no page here. Those of ours must have one."""
    target = str(node.get("reftarget"))
    return text if node.get("refdomain") == "py" and target.split(".")[0] not in OURS else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("help", Help)
    app.connect("autodoc-process-docstring", as_we_write, priority=400)  # before napoleon
    app.connect("missing-reference", foreign)
