"""Draw a picture from a prompt with a Flux pipeline.

    python examples/text_to_image.py --model FOLDER --prompt "a lighthouse at dusk"

An ordinary diffusers script: it is not written for any particular accelerator.
"""

import argparse

import torch
from diffusers import FluxPipeline


def main():
    parser = argparse.ArgumentParser(description="Draw a picture from a prompt.")
    parser.add_argument("--model", required=True, help="a model's name or folder")
    parser.add_argument("--prompt", default="a lighthouse at dusk, oil on canvas")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="picture.png")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)

    image = pipe(
        args.prompt,
        height=args.size,
        width=args.size,
        num_inference_steps=args.steps,
        generator=torch.Generator("cpu").manual_seed(args.seed),
    ).images[0]
    image.save(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
