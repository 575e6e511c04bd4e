"""Execute notebooks in place, reproducibly: `python tutorials/execute.py [names]`, by default all.

The environment is fixed (cpu scale, one thread), and what changes from run to run (stderr, progress
bars, widget state, timestamps) is stripped; drawings and large pictures are stored with 256
colours. Then figures/claims.md is written again (`claims.py`).
"""

import argparse
import base64
import io
import os
from pathlib import Path

import claims

HERE = Path(__file__).resolve().parent
FIXED = {
    "MINIDISTILL_SCALE": "cpu",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONPATH": str(HERE.parent),
}


SMALL, LARGE = 30_000, 100_000  # bytes
SEEN = 0.5  # of 255: the mean difference up to which nobody misses the other colours


def smaller(png):
    """A picture (base64) with 256 colours, if it is large, or a drawing of some size that does not
    miss the others."""
    from PIL import Image, ImageChops, ImageStat

    if len(png) < SMALL * 4 / 3:
        return png
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    fewer = picture.quantize(256, dither=Image.Dither.NONE)
    off = max(ImageStat.Stat(ImageChops.difference(picture, fewer.convert("RGB"))).mean)
    if len(png) < LARGE * 4 / 3 and off > SEEN:
        return png
    stored = io.BytesIO()
    fewer.save(stored, "PNG", optimize=True)
    return base64.b64encode(stored.getvalue()).decode() + "\n"


def strip(notebook):
    """Remove from an executed notebook what is not reproducible, and make its pictures smaller."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"
                            and not any("widget" in mime for mime in out.get("data", {}))]
            for data in (out.data for out in cell.outputs if "data" in out):
                if "image/png" in data:
                    data["image/png"] = smaller(data["image/png"])


def asked():
    """The notebooks named on the command line, or all."""
    there = {path.stem: path for path in sorted(HERE.glob("*.ipynb"))}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    listed = f"{', '.join(there)} (default all)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=listed)
    stems = [Path(name).stem for name in parser.parse_args().names]
    if unknown := [stem for stem in stems if stem not in there]:
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(there)}")
    return [there[stem] for stem in stems] or list(there.values())


def execute(path):
    """Run one notebook in its folder and write it back with what it printed and drew."""
    import nbformat  # only now: --help needs neither, and nbclient comes with the extra `dev`
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, kernel_name="python3", timeout=1800, record_timing=False,
                            resources={"metadata": {"path": str(HERE)}})
    client.execute()
    strip(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ.update(FIXED)
    for path in asked():
        print(path.name, flush=True)
        execute(path)
    claims.write()
