"""Runs a small copy of every recipe, and writes what came of it, and what each recipe would cost, into the READMEs.

    python recipes/check.py              # or: make recipes
    python recipes/check.py --costs      # the costs alone: seconds

The copies are those of the tests (tests/tiny_recipes.py). Costs are computed from the shapes in the models'
config.json on the Hub, by the formulas of `merit plan --dry-run`; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tr

from merit_hf.adapters import add_adapter
from merit_hf.config import MeritConfig
from merit_hf.gradients import GradientSettings, trained_parameters
from merit_hf.memory import estimate_memory
from merit_hf.vision import freeze_modules

HERE = Path(__file__).resolve().parent
# What an H100 achieves at 40 % of its peak in bfloat16, as `merit plan --dry-run` takes it.
TERAFLOPS = 400
# Where a recipe sets no max_length, since sequences with images cannot be cut.
TOKENS_OF_AN_EXAMPLE = 1024
_QWEN = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
_QWEN_3B = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, **_QWEN,
}  # fmt: skip


def smollm2() -> Any:
    return tr.LlamaForCausalLM(tr.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ))  # fmt: skip


def qwen_3b() -> Any:
    return tr.Qwen2ForCausalLM(tr.Qwen2Config(**_QWEN_3B))


def qwen_7b() -> Any:
    return tr.Qwen2ForCausalLM(tr.Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False, **_QWEN,
    ))  # fmt: skip


def qwen_vl_3b() -> Any:
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**_QWEN_3B, "rope_parameters": rope}
    config = tr.Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)
    return tr.Qwen2_5_VLForConditionalGeneration(config)


MODELS = {
    "smollm2-135m": smollm2, "smollm2-lora": smollm2, "qwen2.5-3b-flan": qwen_3b, "qwen2.5-7b-mixture": qwen_7b,
    "qwen2.5-vl-3b-vision-flan": qwen_vl_3b,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """An estimate, in bytes and hours.

    Attributes:
        states: weights and their gradients in float32, and AdamW's two moments: 4 bytes a parameter, and 12 more of
            each that is trained.
        activations: of one micro-batch on one GPU, in bfloat16, layers computed twice (TRL's gradient_checkpointing),
            logits of all tokens included: the rule of thumb of merit_hf/memory.py.
        planning: weights, the largest gradient or all of them as plan.low_memory says, activations of
            plan.tokens_per_batch tokens.
        hours: of one GPU at 400 TFLOP/s, for training on 100 million tokens: 4 operations a parameter and 2 more a
            trained one.
        checkpoint: what a group's finished checkpoint takes on disk.
    """

    num_parameters: int
    num_trained: int
    states: int
    activations: int
    planning: int
    hours: float
    checkpoint: int


def config_of(name: str) -> MeritConfig:
    (path,) = (HERE / name).glob("*.yaml")
    return MeritConfig.from_yaml(path)


def cost_of(name: str) -> Cost:
    """What a recipe would take, from the shape of its model."""
    config = config_of(name)
    with torch.device("meta"):
        model = MODELS[name]()
        freeze_modules(model, config.base.freeze)
        if config.peft is not None:
            model = add_adapter(model, config.peft, seed=0)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for _, parameter in trained_parameters(model))
    tokens = config.sft["per_device_train_batch_size"] * (config.sft["max_length"] or TOKENS_OF_AN_EXAMPLE)
    training = estimate_memory(
        model, tokens, tokens, GradientSettings(gradient_checkpointing=True), activation_width=2
    )
    plan = config.plan
    settings = GradientSettings(plan.tokens_per_batch, plan.low_memory or False, plan.gradient_checkpointing)
    planning = estimate_memory(model, plan.tokens_per_batch, plan.tokens_per_batch, settings, activation_width=2)
    return Cost(
        num_parameters=total if config.peft is None else total - trained,
        num_trained=trained,
        states=4 * total + 12 * trained,
        activations=training.activations + training.logits,
        planning=4 * total + planning.total,
        hours=1e8 * (4.0 * total + 2.0 * trained) / (TERAFLOPS * 1e12) / 3600,
        checkpoint=4 * (total if config.peft is None else trained),
    )


def cost_block(name: str) -> str:
    """The table of a recipe's README."""
    cost, sft = cost_of(name), config_of(name).sft
    batch, length = sft["per_device_train_batch_size"], sft["max_length"]
    examples = f"{batch} examples of {length or TOKENS_OF_AN_EXAMPLE:,} tokens" + ("" if length else " (assumed)")
    rows = [
        ("parameters, and those that are trained", f"{cost.num_parameters:,}; {cost.num_trained:,}"),
        ("weights, gradients, AdamW's moments (float32)", size(cost.states)),
        (f"activations on a GPU, {examples}", size(cost.activations)),
        ("memory while planning, on one GPU", size(cost.planning)),
        ("training on 100 million tokens, at 400 TFLOP/s", f"{cost.hours:.2g} GPU-hours"),
        ("a group's finished checkpoint", size(cost.checkpoint)),
    ]
    return "| estimate | |\n|---|---|\n" + "".join(f"| {what} | {value} |\n" for what, value in rows)


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def outcome_table() -> str:
    """Run the copies and say, a row a recipe, what was seen."""
    sys.path += [str(HERE.parent / "tests"), *map(str, [HERE / "llava-tiny", HERE / "qwen2.5-vl-3b-vision-flan"])]
    from tiny_recipes import COPIES, Kitchen

    lines = [
        "| recipe | datasets | parses | tiny run passes | tokens exact | resume exact | accelerate config | wrapper "
        "seen | *not exercised* |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch, Kitchen(Path(scratch)) as kitchen:
        for name, copy in COPIES.items():
            config = config_of(name)
            found = kitchen.run(name)
            used = "cpu_2, for " + copy.config if copy.config != "single_gpu" else "none, for single_gpu"
            resume = found.killed and found.resume
            lines.append(
                f"| [{name}]({name}/README.md) | {len(config.datasets)} | yes | {mark(found.merged)} | "
                f"{mark(found.tokens)} | {mark(resume)} | {used} | "
                f"{found.wrapper or 'none'}, {found.num_processes} process{'es' if found.num_processes > 1 else ''} | "
                f"{not_exercised(name, copy)} |"
            )
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def not_exercised(name: str, copy: Any) -> str:
    missing = ["GPU"]
    if name in MODELS:
        missing += ["the real model and data"]
    if copy.config == "fsdp2":
        missing += ["FSDP2 in training: accelerate makes DDP of it on a CPU"]
    if copy.stands_for:
        missing += [f"its architecture ({copy.stands_for})"]
    return "; ".join(missing)


def mark(passed: bool) -> str:
    return "yes" if passed else "**no**"


def put(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of `name` in a README."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{start}{text}{end}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--costs", action="store_true", help="write the costs alone, and run nothing")
    options = parser.parse_args(argv)
    for name in MODELS:
        put(HERE / name / "README.md", "cost", cost_block(name))
    if not options.costs:
        put(HERE / "README.md", "runs", outcome_table())


if __name__ == "__main__":
    main()
