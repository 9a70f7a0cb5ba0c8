"""Draw pictures from prompts with a text-to-image pipeline such as Flux.

    python examples/text_to_image.py --model FOLDER --prompt "a lighthouse at dusk"

An ordinary diffusers script: it is not written for any particular accelerator. With several
prompts, or several pictures of each, they are saved as one sheet with a row for each prompt.
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid


def main():
    parser = argparse.ArgumentParser(description="Draw pictures from prompts.")
    parser.add_argument("--model", required=True, help="a model's name or folder")
    parser.add_argument("--prompt", nargs="+", default=["a lighthouse at dusk, oil on canvas"])
    parser.add_argument("--each", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--text-length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--seed", type=int, default=0, help="that of the first picture")
    parser.add_argument("--output", default="picture.png")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=None, leave=False)  # a bar on a terminal only

    images = []
    for prompt in args.prompt:
        seeds = range(args.seed + len(images), args.seed + len(images) + args.each)
        images += pipe(
            prompt,
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            num_images_per_prompt=args.each,
            max_sequence_length=args.text_length,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
    make_image_grid(images, rows=len(args.prompt), cols=args.each).save(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
