"""Start the inspector's page."""

import sys
from pathlib import Path

from vlmdiff.core.network import Guard
from vlmdiff.core.params import Params


def serve(params: Params, model: Path | None, address: str, port: int) -> None:
    """Run Streamlit's server of the page until it is ended.

    model: a detector's folder, by default the champion. Raises InputError if there is no champion.
    """
    from starlette.middleware import Middleware
    from streamlit import App

    name = str(model)
    if model is None:
        from vlmdiff.registry.promotion import champion

        version, model = champion(params)
        name = f"version {version} of {params.registry.model_name}, the champion"
    options = {"server.address": address, "server.port": port, "server.headless": True}
    options |= {"server.fileWatcherType": "none", "browser.gatherUsageStats": False, "client.toolbarMode": "minimal"}
    page = Path(__file__).with_name("inspector_page.py")
    print(f"the inspector's page: http://{address}:{port}", flush=True)
    sys.argv = [str(page), str(model), name]
    App(page, middleware=[Middleware(Guard)]).run(config=options)
