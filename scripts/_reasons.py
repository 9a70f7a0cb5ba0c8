"""What every reason means that a call or a patch can be given, and what to do about it.

docs/guides/fallbacks.md is made of this table. tests/docs/test_reasons.py reads the package and
fails where a reason is missing here, or one stands here that the package no longer has.
"""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """One reason.

    Attributes:
        text: as the report shows it; ``…`` stands for what differs from case to case.
        means: what was found, in a sentence.
        do: what to do, in a sentence.
    """

    text: str
    means: str
    do: str


class Group(NamedTuple):
    """Reasons that belong together."""

    title: str
    reasons: tuple[Reason, ...]


_NOTHING = "Nothing: the original is right here"
_INFERENCE = "Run inference inside `torch.no_grad()`"

COUNTED = (
    Group(
        "Something went wrong",
        (
            Reason(
                "the kernel raised …",
                "The new path raised an error, the original then gave the result. Calls of the "
                "same shapes go to the original from now on",
                "Run once with `--strict` to see the whole error, and report it; `--skip` the "
                "patch meanwhile. Running out of memory is never caught",
            ),
            Reason(
                "raised, as the original does",
                "Both the new path and the original refused the call",
                "Look at the call: the error that your script saw is the original's, or names the "
                "argument that is wrong",
            ),
            Reason(
                "failed verification at this line",
                "With `verify=N`: an earlier call of this line was less accurate than the "
                "original, against float64",
                "The report names the line and the error; `--skip` the patch and report it",
            ),
        ),
    ),
    Group(
        "Any patch",
        (
            Reason(
                "needs gradients",
                "Autograd records and a tensor of the call requires a gradient; training is left "
                "alone",
                f"{_INFERENCE}, as diffusers' pipelines do",
            ),
            Reason(
                "dropout",
                "`dropout_p` is not 0",
                "Call `model.eval()` if this is inference",
            ),
            Reason(
                "autocast decides the dtype",
                "The call is inside `torch.autocast`, which casts inside the original",
                "Load the model in the dtype you want (`torch_dtype=torch.bfloat16`) and leave "
                "autocast out",
            ),
            Reason(
                "inside torch.jit.trace",
                "Sizes are values of the trace, and comparing them would fix them",
                "Nothing: the traced module calls the originals",
            ),
            Reason(
                "dtype other than float32, bfloat16, float16",
                "A tensor is float64, integer, complex or 8 bit",
                "Nothing, if the dtype is meant",
            ),
            Reason(
                "not a tensor",
                "An argument that is a tensor in known models is something else, or nested",
                f"{_NOTHING}, or it raises the proper error",
            ),
            Reason(
                "argument of an unusual type",
                "An argument has a type or form that no known model passes: a tensor subclass, a "
                "tensor as `scale`, an additional argument",
                "Pass plain numbers and tensors if the call is yours",
            ),
            Reason(
                "a subclass overrides part of it",
                "A class inherits the patched method and brings its own version of a method that "
                "it calls",
                _NOTHING,
            ),
            Reason(
                "operands on several devices",
                "Tensors of one expression lie on different devices",
                "Look where the model is split; a scale on the CPU costs a copy in every step",
            ),
        ),
    ),
    Group(
        "Attention: `F.scaled_dot_product_attention`",
        (
            Reason(
                "nested tensor",
                "Query, key or value is a nested tensor",
                "Pack the sequences and call `mindiesd.attention_forward_varlen`, see "
                "[Layouts and masks](layouts_and_masks.md)",
            ),
            Reason(
                "3-D input",
                "Query is [heads, S, D], without a batch",
                "Add a dimension of 1 if the call is yours; on an NPU these calls are taken",
            ),
            Reason(
                "not 4-D",
                "Query, key or value has another number of dimensions",
                "Bring them to [B, N, S, D] if the call is yours",
            ),
            Reason(
                "batch sizes differ",
                "Query, key and value have different batch sizes; the original broadcasts or "
                "raises",
                "`expand` the smaller ones if the call is yours",
            ),
            Reason(
                "key and value differ in heads or length",
                "What PyTorch makes of it depends on its kernel",
                "Look at the call",
            ),
            Reason(
                "query and key differ in head dimension",
                "The original raises",
                "Look at the call",
            ),
            Reason(
                "head counts differ without enable_gqa",
                "The original broadcasts a single key head and raises otherwise",
                "Pass `enable_gqa=True` if grouped queries are meant",
            ),
            Reason(
                "head counts do not divide",
                "The query heads are not a multiple of the key heads",
                "Look at the call: the original raises",
            ),
            Reason(
                "query, key and value differ in dtype",
                "The original raises",
                "Cast them to one dtype",
            ),
            Reason(
                "dtype float64",
                "No fused kernel takes float64",
                "Load the model in float32 or half precision",
            ),
            Reason(
                "dtype is not floating",
                "Integer or complex tensors",
                "Look at the call: the original raises",
            ),
            Reason(
                "query, key and value differ in device",
                "The original raises",
                "Bring them to one device",
            ),
            Reason(
                "mask and is_causal together",
                "What PyTorch makes of the two together depends on its version and its kernel",
                "Put the causal part into the mask",
            ),
            Reason(
                "mask is not a dense tensor",
                "The mask is nested or no tensor",
                "Pass a dense bool mask, or none",
            ),
            Reason(
                "mask dtype",
                "The mask is neither bool nor float32 nor of the query's dtype",
                "Use a bool mask (True attends), or an additive one of the query's dtype",
            ),
            Reason(
                "mask on another device",
                "The mask does not lie where the query does",
                "Move it once, before the loop",
            ),
            Reason(
                "mask does not broadcast",
                "Its shape does not fit [B, N, Sq, Skv]",
                "Look at the call: the original raises",
            ),
        ),
    ),
    Group(
        "Attention written out, and `nn.MultiheadAttention`",
        (
            Reason(
                "scale that is not a number",
                "The scale is a tensor or text",
                _NOTHING,
            ),
            Reason(
                "attention scores of its own",
                "The layer brings its own `get_attention_scores`",
                _NOTHING,
            ),
            Reason(
                "shapes that are not those of an attention",
                "The operands of the two products have other shapes than in the known model",
                _NOTHING,
            ),
            Reason(
                "mask of another dtype than the scores",
                "Adding it would promote the scores to another dtype",
                "Cast the mask to the dtype of the query",
            ),
            Reason(
                "not nn.MultiheadAttention itself, or with hooks",
                "A subclass or a hooked module may do more than its forward says",
                "Remove the hooks if they are no longer needed",
            ),
            Reason(
                "self-attention, which has a kernel of its own",
                "PyTorch computes the whole layer in one C++ function",
                _NOTHING,
            ),
        ),
    ),
    Group(
        "Norms, modulations and gates",
        (
            Reason(
                "normalises over more than the last dimension",
                "Kernels normalise over the last dimension only",
                _NOTHING,
            ),
            Reason(
                "weight or bias does not match the last dimension",
                "The original broadcasts or raises",
                "Look at the call",
            ),
            Reason(
                "weight dtype that the original rejects or promotes",
                "Input and weight differ in a way that changes the dtype of the result, or that "
                "the original refuses",
                "Load the whole model in one dtype; `_keep_in_fp32_modules` of a model makes this "
                "on purpose",
            ),
            Reason(
                "norm with hooks, or with a forward of its own",
                "A hook must see what the norm alone returns",
                "Remove the hooks if they are no longer needed. accelerate's offloading adds some: "
                "`enable_model_cpu_offload` only to whole models, `enable_sequential_cpu_offload` "
                "to every norm",
            ),
            Reason(
                "a norm with a bias, or of another class",
                "Scale and weight fold into one only without a bias",
                f"{_NOTHING}; the norm itself is still redirected",
            ),
            Reason(
                "more than one scale: the product is one kernel as it is",
                "Every sample of the batch has its own scale, so nothing can be folded",
                f"{_NOTHING}; the norm itself is still redirected",
            ),
            Reason(
                "scale or shift does not span the last dimension",
                "The modulation is not one value a channel",
                _NOTHING,
            ),
            Reason(
                "float32 without a bias: as few operators as it can be",
                "A channel norm in float32 gains nothing from the other path",
                "Nothing, or use half precision",
            ),
            Reason(
                "no kernel of group norm and SiLU but on an Ascend NPU",
                "Group norm and SiLU are one kernel on an NPU only",
                "Nothing: expected on a CPU",
            ),
            Reason(
                "no table of group norms for this series of Ascend",
                "No documentation says what the kernel takes there",
                _NOTHING,
            ),
            Reason(
                "dtype that the group norm kernel does not take",
                "The input is float64, or bfloat16 on a 310P",
                "Use float16 or float32",
            ),
            Reason(
                "group norm without parameters",
                "The kernel needs a weight and a bias",
                _NOTHING,
            ),
            Reason(
                "group norm with parameters of another dtype",
                "Input and parameters differ in dtype",
                "Load the whole model in one dtype",
            ),
            Reason(
                "not 2 to 8 dimensions, one number in a group, or no epsilon",
                "Outside of the kernel's limits",
                f"{_NOTHING}, or raises",
            ),
            Reason(
                "channels that do not match the parameters or the groups",
                "The original raises",
                "Look at the call",
            ),
            Reason(
                "not nn.GroupNorm, or with hooks",
                "A subclass or a hooked norm may do more than its forward says",
                "Remove the hooks if they are no longer needed",
            ),
            Reason(
                "not nn.SiLU, or with hooks",
                "The activation behind the norm is another one",
                _NOTHING,
            ),
            Reason(
                "divided by another number than 1.0",
                "The division by `output_scale_factor` or `rescale_output_factor` does something",
                _NOTHING,
            ),
            Reason(
                "not nn.SiLU and nn.Linear, or with hooks",
                "The projection of the conditioning is another one (a quantised or LoRA layer, a "
                "hooked module)",
                "`pipe.fuse_lora()` if adapters are the cause",
            ),
        ),
    ),
    Group(
        "Activations",
        (
            Reason(
                "no kernel of this device computes it at once",
                "The fused activation exists on an NPU only",
                "Nothing: expected on a CPU",
            ),
            Reason(
                "its activation is another one, or has hooks",
                "The layer was configured with another activation than the known one",
                _NOTHING,
            ),
        ),
    ),
    Group(
        "Rotary embeddings",
        (
            Reason(
                "not a 4-D input with even head_dim, or an unknown sequence_dim or unbind dim",
                "`apply_rotary_emb` was called in a form that no known model uses",
                _NOTHING,
            ),
            Reason(
                "tables are not of this input's shape",
                "The tables do not broadcast to the input in the known way",
                "Look at the call: the original broadcasts or raises",
            ),
            Reason(
                "tables on another device than the input",
                "The tables were made on the CPU and are copied in every step",
                "Move the tables once, before the loop",
            ),
            Reason(
                "tables outside of [-1, 1], which the Ascend kernel documents",
                "The kernel promises nothing for such numbers; scaled tables (YaRN's attention "
                "factor) have them",
                _NOTHING,
            ),
            Reason(
                "the original computes in float64",
                "A float32 input with float64 tables: the kernel would be less accurate",
                "Use half precision, or accept the original",
            ),
            Reason(
                "real tables, which no model passes to this function",
                "`use_real=True` where only complex tables are known",
                _NOTHING,
            ),
        ),
    ),
    Group(
        "Tables that are kept from step to step",
        (
            Reason(
                "inference tensors, whose changes are not counted",
                "Inside `torch.inference_mode()` PyTorch does not count writes, so nothing made "
                "from such a tensor may be kept",
                "Use `torch.no_grad()` instead of `torch.inference_mode()`",
            ),
            Reason(
                "module with parameters, or settings that are not numbers",
                "Its result may depend on more than its input",
                _NOTHING,
            ),
        ),
    ),
    Group(
        "Functions that are rewritten from their own source",
        (
            Reason(
                "not rewritten: …",
                "The source of the function is not one that the patch was written for: another "
                "release, an edited file, another patch over it, or no source at all",
                "Compare the installed version with constraints.txt; a copied and edited model "
                "runs as it is",
            ),
            Reason(
                "could not be rewritten: …",
                "Rewriting failed with an error of ours",
                "Report it with the text behind the colon; the original ran",
            ),
        ),
    ),
    Group(
        "Attention by name",
        (
            Reason(
                "mask that this backend rejects",
                "The backend that was named takes no mask, or no mask of this form; the original "
                "raises",
                "Name the backend `native`, or leave the mask out",
            ),
            Reason(
                "scale, norms or mask that the fused processor treats differently",
                "The two processors would not compute the same for this layer",
                _NOTHING,
            ),
            Reason(
                "not on an NPU, or the sdpa patch is not in force",
                "Attention slicing saves memory where no fused kernel does",
                "Nothing; on an NPU, do not `--skip sdpa`",
            ),
            Reason(
                "no fused kernel of this Ascend takes the heads or the dtype",
                "Sliced attention stays sliced, since it would need the whole score matrix",
                _NOTHING,
            ),
            Reason(
                "torch_npu is not installed: the ordinary processor is taken anyway",
                "An old diffusers asks for an NPU when a model is made; there is none",
                "Nothing",
            ),
        ),
    ),
    Group(
        "Sparse attention",
        (
            Reason(
                "not the self-attention of the video",
                "Cross attention, a text refiner, or a sequence that something was added to",
                "Nothing",
            ),
            Reason(
                "the latent shape is not known",
                "The model was called without what tells frames, height and width",
                "Use the model through its pipeline",
            ),
            Reason(
                "as many text tokens as video tokens",
                "Self and cross attention cannot be told apart by length",
                "Use another size, or other text padding",
            ),
            Reason(
                "shorter than min_sequence",
                "Estimating costs more than it saves in short sequences",
                "Nothing, or a smaller `min_sequence`",
            ),
            Reason(
                "a mask that is not the same padding for the whole batch",
                "Only padding that can be cut off leaves the attention what it is",
                "Generate prompts of one length together, or one at a time",
            ),
            Reason("causal", "Video attention is not causal", "Nothing"),
            Reason(
                "a layer to be kept dense", "`first_layers` or `last_layers` says so", "Nothing"
            ),
            Reason("a step to be kept dense", "`first_steps` or `last_steps` says so", "Nothing"),
        ),
    ),
    Group(
        "flash_attn, xformers and sageattention",
        (
            Reason(
                "on a CUDA device: the package's own kernel",
                "The package is installed and its kernel can run",
                "Nothing",
            ),
            Reason(
                "computed natively: no kernel caps scores",
                "`softcap` is given",
                "Nothing: composed in float32, slower",
            ),
            Reason(
                "computed natively: dropout",
                "`dropout_p` is given",
                "Leave it out for inference",
            ),
            Reason(
                "computed natively: needs gradients",
                "A tensor needs a gradient",
                _INFERENCE,
            ),
            Reason(
                "computed natively: the log-sum-exp is asked for",
                "`return_lse` or `return_attn_probs`: kernels return the output only",
                "Leave it out if it is not used",
            ),
        ),
    ),
)

SKIPPED = (
    Group(
        "Versions and packages",
        (
            Reason(
                "… has not been imported",
                "The patch is `pending`, not skipped: it acts as soon as the module is imported",
                "Nothing",
            ),
            Reason(
                "… is not installed",
                "The library that the patch belongs to is absent",
                "Nothing, if your script does not need it",
            ),
            Reason(
                "… is not a tested version (…)",
                "Another release than those that the patch was read against",
                "Install a tested one (constraints.txt), or live without the patch",
            ),
            Reason(
                "… has no version to check",
                "A package of that name can be imported but was not installed as one",
                "Install it with pip instead of putting its folder on the path",
            ),
            Reason(
                "… does not need it (… does)",
                "The patch repairs a fault that the installed version does not have",
                "Nothing",
            ),
        ),
    ),
    Group(
        "The target is not what it was",
        (
            Reason(
                "… does not exist here",
                "The function, class or table has moved or is gone",
                "As for another version",
            ),
            Reason(
                "… is inherited, not defined there",
                "The class no longer brings the method itself",
                "As for another version",
            ),
            Reason(
                "… was already replaced by …",
                "Another tool put its function there first",
                "Apply mindiesd before that tool, or do without one of the two",
            ),
            Reason(
                "takes …, known is …",
                "The parameters changed, so the patch cannot pass them on",
                "As for another version",
            ),
            Reason(
                "takes …, without …",
                "A parameter that tells the video's shape is gone",
                "As for another version",
            ),
            Reason(
                "has the parameters …",
                "The function takes another number of arguments than the known form",
                "As for another version",
            ),
            Reason(
                "is a …, not a plain function",
                "Something else stands there, perhaps another tool's wrapper",
                "Apply mindiesd before that tool",
            ),
            Reason(
                "its source is none of the known forms of this activation",
                "The code was read and is not one that the patch computes",
                "As for another version",
            ),
            Reason(
                "its source is none of the known forms of a channel norm",
                "The code was read and is not one that the patch computes",
                "As for another version",
            ),
            Reason(
                "its source is none of the known forms of an RMS norm",
                "The code was read and is not one that the patch computes",
                "As for another version",
            ),
            Reason(
                "its source cannot be read: not a Python function",
                "It is compiled, or another tool's object",
                "Apply mindiesd before that tool",
            ),
            Reason(
                "its source cannot be read: …",
                "See the texts below",
                "Install the library with its sources",
            ),
            Reason(
                "could not be built: …",
                "Making the redirect failed with an error of ours",
                "Report it with the text behind the colon",
            ),
        ),
    ),
    Group(
        "Why a source is not taken (behind `not rewritten:` and `cannot be read:`)",
        (
            Reason(
                "source not available",
                "There is no `.py` file: compiled, frozen or typed in",
                "Install the library with its sources",
            ),
            Reason(
                "source is not the loaded code",
                "The file on disk was changed after it was imported, or something else was loaded",
                "Restart; then as for another version",
            ),
            Reason(
                "not a function defined with def",
                "A lambda or a generated function",
                "Nothing",
            ),
            Reason(
                "not compiled where it stands",
                "The function is generic in its own scope (Python 3.12's type parameters)",
                "Nothing",
            ),
            Reason(
                "a decorator does not show what it wraps",
                "A decorator hides the function under it",
                "Apply mindiesd before what decorates it",
            ),
            Reason(
                "…: another source than the known",
                "The whole function differs from what the patch was written for",
                "As for another version",
            ),
            Reason(
                "… found … times, … are known",
                "The function has more or fewer of the expressions that are redirected",
                "As for another version",
            ),
            Reason(
                "… uses variables of the function around it",
                "The expression cannot be moved into a function of its own",
                "As for another version",
            ),
            Reason(
                "… has default values",
                "The inner function has default values, which are not carried over",
                "As for another version",
            ),
            Reason(
                "… does not take what its replacement takes",
                "The inner function has other parameters than the replacement was written for",
                "As for another version",
            ),
        ),
    ),
)

UNJUDGED = (
    Group(
        "Verification without a verdict by float64",
        (
            Reason(
                "no float64 reference: …",
                "The original cannot be run with float64 arguments on the CPU, so the two results "
                "were compared with each other, more generously",
                "Nothing; the error's name stands behind the colon",
            ),
            Reason(
                "the original raised …",
                "Ours gave a result where the original, asked for comparison, raised an error; the "
                "redirected result was used",
                "Run without mindiesd: if the script fails there too, nothing is wrong here",
            ),
            Reason(
                "could not be judged: …",
                "Comparing failed; the redirected result was used",
                "Report it with the error's name",
            ),
        ),
    ),
)


def page() -> str:
    """The page of the guides, docs/guides/fallbacks.md."""
    lines = [
        "# When something falls back",
        "",
        "<!-- Generated from scripts/_reasons.py by `python scripts/_docs.py`; do not edit. -->",
        "",
        "A call that was not redirected went to the original, with its original arguments, and was "
        "counted with a reason. Nothing is wrong then: the result is what it would have been "
        "without mindiesd. A reason with a large count is a chance.",
        "",
        "```bash",
        "mindiesd-run --report --sites -c 'import torch; "
        "torch.nn.functional.rms_norm(torch.ones(2, 8).double(), [8])'",
        "```",
        "",
        "shows each reason with its count and, with `--sites`, the line that made the call. "
        "[The report](../report.md) says what its columns mean. Which *kernel* took a redirected "
        "call, and why not another, is `explain` in [the Ascend backend](../npu_backend.md).",
        "",
        "`…` stands for what differs from case to case.",
        "",
        "## Calls that fell back",
        "",
    ]
    for group in COUNTED:
        lines += _table(group)
    lines += [
        "## Patches that were skipped",
        "",
        "`mindiesd-run --status` shows these before anything runs. A skipped patch redirects "
        "nothing; the script runs on. With `--strict`, or where `--only` names it, it is an error. "
        "*As for another version*: install one that constraints.txt names, or do without.",
        "",
    ]
    for group in SKIPPED:
        lines += _table(group)
    lines += ["## Under `verify=N`", ""]
    for group in UNJUDGED:
        lines += _table(group)
    return "\n".join(lines)


def _table(group: Group) -> list[str]:
    rows = [
        f"| `{reason.text}` | {reason.means}. | {reason.do}. |".replace("\n", " ")
        for reason in group.reasons
    ]
    return [f"### {group.title}", "", "| reason | means | do |", "|---|---|---|", *rows, ""]
