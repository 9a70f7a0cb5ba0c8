"""What ``scripts/demo`` runs: the same script with and without mindiesd, and a comparison.

Everything happens on the CPU, where the two pictures must be the same. Exit status 1: they are
not, or a patch that this pipeline should exercise was never taken.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "demo"
MODEL = OUT / "tiny-flux"
SCRIPT = "examples/text_to_image.py"
PROMPT = "a lighthouse at dusk, oil on canvas"

# The largest difference allowed in any colour channel of any pixel, of 255.
TOLERANCE = 1
# The families of patches that a Flux pipeline calls at every step.
FAMILIES = ("sdpa", "rms_norm", "layer_norm", "rope")

ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",  # the tolerance is for the CPU
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    # Warnings and progress bars of the libraries, which are the same with and without mindiesd.
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    plain, patched, again = OUT / "plain.png", OUT / "patched.png", OUT / "patched-again.png"
    report = OUT / "report.json"
    for old in (plain, patched, again, report):
        old.unlink(missing_ok=True)

    stage("1/4  build a tiny Flux pipeline with random weights")
    run([sys.executable, "examples/make_tiny_flux.py", shown(MODEL)])
    stage("2/4  draw with plain Python")
    run([sys.executable, *drawing(plain)])
    stage("3/4  draw with the same script under mindiesd-run")
    launcher = str(Path(sys.executable).with_name("mindiesd-run"))
    run([launcher, "--report", *drawing(patched)])
    run([launcher, f"--report={shown(report)}", *drawing(again)])
    stage("4/4  compare")
    difference = max(largest_difference(plain, patched), largest_difference(plain, again))
    print(f"largest difference in any pixel: {difference} of 255 (allowed: {TOLERANCE})")
    counts = redirected(report)
    print("calls redirected: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    comparison = OUT / "comparison.png"
    compose(plain, patched, difference, comparison)
    print(f"the two pictures side by side: {shown(comparison)}")

    if difference > TOLERANCE:
        fail(f"the pictures differ by {difference} of 255, more than {TOLERANCE}")
    missing = [name for name, count in counts.items() if not count]
    if missing:
        fail(f"no call was redirected by: {', '.join(missing)} (see {shown(report)})")
    print("demo passed: the picture is the same, and every expected patch was taken")


def drawing(output):
    """The script and its arguments, the same for every run but for the output."""
    return [SCRIPT, "--model", shown(MODEL), "--prompt", PROMPT, "--output", shown(output)]


def run(command):
    """Run one command from the project's folder, shown as a person would type it."""
    words = [Path(command[0]).name, *command[1:]]
    print("  $ " + " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False).returncode
    if code:
        fail(f"that command ended with status {code}")
    print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)


def redirected(report):
    """Family of patches -> calls that it redirected, as the report says."""
    counts = dict.fromkeys(FAMILIES, 0)
    for patch in json.loads(report.read_text(encoding="utf-8"))["patches"]:
        if patch["family"] in counts:
            counts[patch["family"]] += patch["redirected"]
    return counts


def largest_difference(first, second):
    """The largest difference in any channel of any pixel, 0 to 255."""
    difference = ImageChops.difference(
        *(Image.open(path).convert("RGB") for path in (first, second))
    )
    return max(high for _, high in difference.getextrema())


def compose(plain, patched, difference, output):
    """Both pictures and their difference, made visible, in one picture with captions."""
    pictures = [Image.open(path).convert("RGB") for path in (plain, patched)]
    gain = 255 // max(difference, 1)
    pictures.append(ImageChops.difference(*pictures).point(lambda value: value * gain))
    captions = [
        "python text_to_image.py",
        "mindiesd-run text_to_image.py",
        f"difference × {gain}" if difference else "difference: none",
    ]
    gap, band = 16, 36
    width, height = pictures[0].size
    sheet = Image.new("RGB", (3 * width + 4 * gap, height + band + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = gap + column * (width + gap)
        draw.text((left, 10), caption, fill="black", font=font)
        sheet.paste(picture, (left, band))
    sheet.save(output)


def stage(text):
    print(f"\n[{text}]", flush=True)


def shown(path):
    """A path as seen from the project's folder."""
    return str(path.relative_to(ROOT))


def fail(reason):
    print(f"demo FAILED: {reason}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
