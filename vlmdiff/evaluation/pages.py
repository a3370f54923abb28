"""Render HTML pages from the templates in this package. Each is one file and needs no network and no script."""

from typing import Any

from vlmdiff.core.text import counted


def page(template: str, **content: Any) -> str:
    """Return the page. A variable that the template uses and `content` lacks is an error."""
    # Imported here because most commands render no page.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmdiff.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(counted=counted, **content)
