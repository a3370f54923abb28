"""Start the inspector's page."""

import os
import sys
from pathlib import Path

from vlmdiff.core.params import Params


def serve(params: Params, model: Path | None, address: str, port: int) -> None:
    """Replace this process by Streamlit's server of the page. Does not return.

    model: a detector's folder, by default the champion. Raises InputError if there is no champion.
    """
    name = str(model)
    if model is None:
        from vlmdiff.registry.promotion import champion

        version, model = champion(params)
        name = f"version {version} of {params.registry.model_name}, the champion"
    options = [f"--server.address={address}", f"--server.port={port}", "--server.headless=true"]
    options += ["--server.fileWatcherType=none", "--browser.gatherUsageStats=false", "--client.toolbarMode=minimal"]
    page = str(Path(__file__).with_name("inspector_page.py"))
    print(f"the inspector's page: http://{address}:{port}", flush=True)
    # Whoever ends this process ends the page.
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", page, *options, "--", str(model), name])
