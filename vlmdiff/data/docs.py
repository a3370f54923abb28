"""Render Great Expectations' Data Docs as pages that work offline."""

from great_expectations.render.view import DefaultJinjaPageView
from jinja2 import ChoiceLoader, PackageLoader


class Page(DefaultJinjaPageView):
    """A page of Data Docs. Our templates replace those that load styles, scripts and a logo from the internet."""

    def __init__(self, custom_styles_directory: str | None = None, custom_views_directory: str | None = None) -> None:
        super().__init__(custom_styles_directory, custom_views_directory)
        self.env.loader = ChoiceLoader([PackageLoader("vlmdiff.data"), *filter(None, [self.env.loader])])


VIEW = {"module_name": __name__, "class_name": Page.__name__}
