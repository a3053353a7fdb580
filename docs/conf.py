"""Settings of the documentation."""

from pathlib import Path

project = "Diptych"
author = "Diptych contributors"
release = (Path(__file__).parent.parent / "VERSION").read_text().strip()
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Diptych {release}"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
