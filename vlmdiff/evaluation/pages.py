"""Pages from the templates beside this: one HTML file each, which needs neither a network nor a script."""

from typing import Any


def page(template: str, **content: Any) -> str:
    """A page; what the template asks for and is not given is an error."""
    # Most who import this draw no page.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmdiff.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)
