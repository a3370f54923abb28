"""The inspector's page, for Streamlit: show what the model says of a photograph, and take the inspector's feedback.

`vlmdiff inspect` runs it in a workspace. Its arguments are the detector's folder and the model's name.
"""

import hashlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import streamlit as st
import torch
from PIL import Image, ImageDraw

from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Params, load
from vlmdiff.core.processes import login_name
from vlmdiff.core.text import markdown
from vlmdiff.data import manifest
from vlmdiff.data.feedback import PLACES, Statement, give_feedback
from vlmdiff.data.images import SUFFIXES, load_rgb, read_image, resolve
from vlmdiff.detection.detector import Detection, Detector, Region, to_tensor
from vlmdiff.detection.heatmap import heatmap
from vlmdiff.training.encoded import Encoded

# Photographs are compared by latents on a grid of this side.
GRID = 8
SIDE = 640
BOX = (0, 220, 255)


@st.cache_resource(show_spinner="Loading the model")
def load_detector(folder: str, stamp: int) -> Detector:
    """Load the detector; another `stamp` of its folder loads it again."""
    return Detector.from_pretrained(folder)


@st.cache_resource(show_spinner=False)
def training_images(stamp: int) -> tuple[list[str], np.ndarray] | None:
    """Return the paths of the normal training images and their features, a row each; None where they are missing."""
    try:
        encoded, frame = Encoded.open(w.ENCODED), manifest.read(w.MANIFEST)
    except InputError:
        return None
    rows = np.flatnonzero(encoded.index["split"] == "train")
    paths = dict(zip(frame["image_id"], frame["path"], strict=True))
    names = [paths.get(image_id) for image_id in encoded.index["image_id"].iloc[rows]]
    known = {i: name for i, name in enumerate(names) if name is not None}
    parts = np.array_split(rows[list(known)], max(len(known) // 256, 1))
    features = np.concatenate([describe(torch.from_numpy(np.array(encoded.mean[part]))) for part in parts])
    return list(known.values()), features


def describe(latents: torch.Tensor) -> np.ndarray:
    """Return rows (B, F) of length one by which photographs are compared: latents (B, C, h, w) on a coarse grid."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(latents.float(), GRID).flatten(1)
    return torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()


@st.cache_data(show_spinner="Looking", max_entries=32)
def judge(data: bytes, name: str, folder: str, stamp: int, caption: str | None) -> tuple[np.ndarray, Detection]:
    """Return the photograph, uint8 (H, W, 3), and what the detector says of it."""
    image = np.array(read_image(io.BytesIO(data), load(w.PARAMS).prepare.max_pixels, name))
    (detection,) = load_detector(folder, stamp).detect([image], captions=None if caption is None else [caption])
    return image, detection


@torch.no_grad()
def most_similar(detector: Detector, image: np.ndarray) -> str | None:
    """Return the path of the most similar normal training image, None where they are missing."""
    known = training_images(stamp_of(w.ENCODED / "index.parquet"))
    if known is None:
        return None
    x = to_tensor(image, detector.pipeline.config.image_size)[None].to(detector.pipeline.device)
    (features,) = describe(detector.pipeline.encode_images(x))
    if features.shape[0] != known[1].shape[1]:
        # The workspace's first stage is not this detector's.
        return None
    return known[0][int(np.argmax(known[1] @ features))]


def stamp_of(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def overlay(image: np.ndarray, detection: Detection, strength: float, boxes: bool) -> Image.Image:
    """Return the photograph, SIDE pixels long, with the anomaly map, of strength 0 to 1, and the regions' boxes."""
    laid = heatmap(image, detection.anomaly_map, 1.0)
    picture = Image.blend(Image.fromarray(image), Image.fromarray(laid), strength)
    scale = SIDE / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    if boxes:
        draw = ImageDraw.Draw(picture)
        for region in detection.scaled_regions(picture.width, picture.height):
            draw.rectangle((region.x0, region.y0, region.x1 - 1, region.y1 - 1), outline=BOX, width=2)
    return picture


def region_rows(regions: list[Region]) -> list[dict[str, str | int]]:
    return [
        {
            "from": f"{region.x0}, {region.y0}",
            "to": f"{region.x1}, {region.y1}",
            "area in pixels": region.area,
            "highest score": f"{region.peak:.3f}",
        }
        for region in regions
    ]


def ask_for_caption(detector: Detector) -> str | None:
    """Ask for the caption by which the detector judges; None where it judges without."""
    match detector.params.captions:
        case "class":
            name = st.selectbox("Product", sorted(detector.class_captions or {}))
            return detector.captions_of([name])[0]
        case "image":
            return st.text_input("Caption of the photograph, as if it were normal") or st.stop()
        case "none":
            return None


def show(image: np.ndarray, detection: Detection, similar: str | None, params: Params) -> None:
    """Show the verdict, the pictures and the regions. similar: the path of the most similar normal training image."""
    verdict, score = st.columns([3, 1], vertical_alignment="center")
    if detection.is_anomalous:
        verdict.error("**Anomalous**: the score is above the threshold.", icon=":material/report:")
    else:
        verdict.success("**Normal**: the score is not above the threshold.", icon=":material/check:")
    score.metric("Score", f"{detection.score:.3f}", help="From 0 to 1; an alarm is a score above 0.5.")
    left, right = st.columns(2)
    strength = left.slider("Strength of the anomaly map", 0.0, 1.0, 0.7, 0.05)
    boxes = right.toggle("Boxes around the regions", value=True)
    columns = st.columns(3)
    columns[0].image(overlay(image, detection, strength, boxes), "Photograph and anomaly map", width="stretch")
    columns[1].image(detection.reconstruction, "As if it were normal", width="stretch")
    if similar is not None:
        normal = load_rgb(resolve(params.prepare.image_root, similar), None, params.prepare.max_pixels)
        columns[2].image(normal, f"Most similar normal image: {markdown(similar)}", width="stretch")
    if detection.regions:
        st.dataframe(region_rows(detection.scaled_regions(image.shape[1], image.shape[0])), hide_index=True)


def ask_for_feedback(upload, similar: str | None, params: Params) -> None:
    """Ask what the photograph shows, and add it to the dataset."""
    st.subheader("Your verdict")
    if params.prepare.layout not in PLACES:
        st.caption(f"Only data of the layouts {' and '.join(PLACES)} take feedback, not {params.prepare.layout}.")
        return
    classes = manifest.read(w.MANIFEST).set_index("path")["class_name"]
    names = sorted(set(classes))
    fields = st.columns(3)
    name = fields[0].selectbox("It shows", names, 0 if similar is None else names.index(classes[similar]))
    defect = fields[1].text_input("Kind of defect, if it has one", "anomaly")
    person = fields[2].text_input("Your name", login_name())
    buttons = st.columns(2)
    said = None
    if buttons[0].button("It is normal: learn from it", width="stretch"):
        said = Statement(name, None, person)
    if buttons[1].button("It is anomalous: test with it", width="stretch"):
        said = Statement(name, defect, person)
    if said is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"photograph{Path(upload.name).suffix.lower()}")
        file.write_bytes(upload.getvalue())
        try:
            added = give_feedback([file], said, params, w.FEEDBACK)
        except InputError as error:
            st.warning(markdown(str(error)))
            return
    new = f"Added as {markdown(str(added[0]))}. The next retrain uses it." if added else "The dataset has it already."
    st.success(new)


def page(folder: str, name: str) -> None:
    st.set_page_config("vlmdiff inspector", layout="wide")
    st.title("Inspector")
    params, stamp = load(w.PARAMS), stamp_of(Path(folder, "detector.json"))
    detector = load_detector(folder, stamp)
    types = sorted(suffix.removeprefix(".") for suffix in SUFFIXES)
    upload = st.file_uploader("A photograph", types)
    if upload is None:
        st.stop()
    try:
        image, detection = judge(upload.getvalue(), upload.name, folder, stamp, ask_for_caption(detector))
    except InputError as error:
        st.error(markdown(str(error)))
        st.stop()
    similar = most_similar(detector, image)
    show(image, detection, similar, params)
    ask_for_feedback(upload, similar, params)
    digest = hashlib.sha256(upload.getvalue()).hexdigest()[:16]
    st.caption(f"{markdown(upload.name)}, sha256 {digest}; judged by {markdown(name)}")


if __name__ == "__main__":
    page(*sys.argv[1:])
