"""The sections of CONFIG, one class each: their keys, types, ranges and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from merit_hf.choices import MAX_INTERPOLATION


class Section(BaseModel):
    """Unknown keys, and values of another type, are mistakes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BaseSection(Section):
    """The merge-ready checkpoint that every group starts from.

    Args:
        model_name_or_path (`str`): a Hub id, or a folder relative to the CONFIG file.
        revision (`str`, *optional*): branch, tag or commit on the Hub; the commit found is pinned in the plan.
        freeze (`list[str]`, *optional*): modules that are not trained, by the beginning of their names in the model,
            such as `model.vision_tower`.
    """

    model_name_or_path: str
    revision: str | None = None
    freeze: list[str] = []


class DatasetSection(Section):
    """One instruction dataset.

    Args:
        name (`str`): unique in the mixture; appears in every table.
        path (`str`): a Hub id, or a .json/.jsonl/.csv/.parquet file relative to the CONFIG file.
        config, split, revision (`str`, *optional*): as in `datasets.load_dataset`; split defaults to `"train"`.
        data_files (`str`, `list` or `dict`, *optional*): files of the Hub repo to read, as in `datasets.load_dataset`:
            one, several, or those of each split.
        where (`dict`, *optional*): only the rows in which each of these columns holds the value, or one of the list of
            values; of held-out rows too.
        prompt, completion, messages, text (`str`, *optional*): the column that holds it, where its name differs.
        images (`str`, *optional*): the column that holds a row's image or images. Default: `images` or `image`, where
            there is one and the base reads images.
        chat (`bool`, *optional*, defaults to `False`): wrap plain prompt and completion strings as a user and an
            assistant turn, so that the chat template applies. TRL trains plain strings without a template.
        tag (`str`, *optional*): a label; `plan.split: by_tag` groups by it.
        eval_path, eval_split (`str`, *optional*): held-out rows, same columns. Otherwise `eval_fraction` of the rows.
        eval_fraction (`float`, *optional*, defaults to `0.05`): share of the rows that is held out of training.
        streaming (`bool`, *optional*, defaults to `False`): of a dataset that is too large to be read whole, its rows
            are a sample of `num_examples`, drawn by the dataset's name, and no more is read than the sample needs.
        num_examples (`int`, *optional*): rows of a streamed dataset, held-out ones among them.
        shuffle_buffer (`int`, *optional*, defaults to `10000`): rows a streamed dataset's are drawn from at a time.
        part (`str`, *optional*): `2/3` is the second of three equal parts of the rows, drawn by the dataset's name;
            the entry is then called `NAME#2`. `plan.split_oversized` makes such entries.
        metric (`str`, *optional*): what `merit evaluate` scores answers by: one of [`METRICS`], or
            `reasoning_gym.TASK`. Default: by the length of the references.
        weight (`float`, *optional*, defaults to `1`): how often an epoch passes over the dataset: 2 takes every row
            twice, 0.5 rows with half of its tokens, drawn by the dataset's name. A dataset's share of its group's
            tokens is so in proportion to its weight times its tokens.
    """

    name: str = Field(min_length=1)
    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: Any = None
    where: Any = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None
    images: str | None = None
    chat: bool = False
    tag: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    streaming: bool = False
    num_examples: int | None = Field(default=None, ge=1)
    shuffle_buffer: int | None = Field(default=None, ge=1, le=1_000_000)
    part: str | None = None
    metric: str | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class PlanSection(Section):
    """How the mixture is split.

    Args:
        split: `merit` (conflict-aware), `affinity` (the same cuts on a matrix of your own), or a baseline: `random`,
            `joint` (one group), `by_tag`, `kmeans` (on the gradients), `kmeans_text` (on text embeddings).
        num_groups (`int`, *optional*): K. Default 4, or the number of datasets where that is smaller; `joint` has one
            group, `by_tag` one a tag and `group_shares` one a share.
        group_shares (`list`, *optional*): what each group is to hold, in any unit, such as `[4, 2, 1, 1]` for GPUs.
        max_imbalance (`float`, *optional*): a group holds at most this many times its share; datasets move to keep it.
        split_oversized (`bool`, *optional*, defaults to `False`): a dataset larger than the largest group's share is
            cut into parts `NAME#1`, `NAME#2`, …, which are datasets of their own.
        affinity (`str`, *optional*): file of the symmetric matrix for `split: affinity`; .csv, .parquet, .npz or .npy.
        embedding_model (`str`, *optional*): Hub id or folder of a text encoder for `split: kmeans_text`, whose last
            hidden states are averaged. Default: TF-IDF and an SVD.
        precondition: `adam` divides every entry of a gradient by √v̂ + ε, Adam's second moment; default `none`.
        optimizer_state (`str`, *optional*): optimizer.pt, or the Trainer checkpoint with it, to take v̂ from. Default:
            measured at the base, on `precondition_batches` training batches of the mixture.
        precondition_batches (`int`, *optional*, defaults to `32`): how many.
        split_seed (`int`, *optional*): of `random` and k-means, which leaves samples and sketch as they are. Default:
            `seed`.
        num_samples (`int` or `"auto"`, *optional*, defaults to `200`): examples a dataset gradient is the mean of.
            `auto` adds examples until the two halves of the sample agree.
        min_reliability (`float`, *optional*, defaults to `0.8`): where `auto` stops: the share of a gradient's squared
            length that is not sampling noise. 0.8 is a cosine of about 0.89 with the gradient of all examples.
        max_num_samples (`int`, *optional*, defaults to `400`): where `auto` stops at the latest. By the method's own
            numbers a dataset reaches 0.8 at about 250 examples; twice its 200 leaves room for noisier ones.
        sketch: how a gradient is read out: `count_sketch`, `stride` (every `stride`-th parameter) or `exact`.
        sketch_dim (`int`, *optional*, defaults to `65536`): length of a count sketch.
        sketch_by_layer (`bool`, *optional*, defaults to `False`): a part of the count sketch for every layer, so that
            there is a conflict matrix of each ([`PartitionPlan.layer_matrices`]).
        reduction: `token_mean` (summed loss over all loss tokens) or `example_mean` (mean of the examples' means).
        center: PCA of the conflict matrix less its `column` mean, of it as it is (`none`), or centred `double`.
        balance: what the groups are balanced in: `tokens`, `examples` or `datasets`.
        axes: `global` (one PCA) or `local` (again inside each half).
        tokens_per_batch (`int`, *optional*, defaults to `2048`): largest micro-batch, padding included, in tokens.
        low_memory (`bool`, *optional*): read every gradient out and free it as soon as it is there. Default: where the
            gradients of all parameters would not fit beside the model.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): compute the layers twice and keep less of
            them, for examples that do not fit otherwise.
        debias: `split_half` divides the cosines by unbiased lengths of the gradients, from the halves of each sample,
            so that noise no longer pulls them towards 0; `none` leaves them as measured.
        seed (`int`, *optional*, defaults to `0`): of samples, sketch and random splits.
    """

    split: Literal["merit", "random", "joint", "by_tag", "kmeans", "kmeans_text", "affinity"] = "merit"
    num_groups: int | None = Field(default=None, ge=1)
    group_shares: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(default=None, min_length=1)
    max_imbalance: float | None = Field(default=None, ge=1)
    split_oversized: bool = False
    affinity: str | None = None
    embedding_model: str | None = None
    precondition: Literal["none", "adam"] = "none"
    optimizer_state: str | None = None
    precondition_batches: int = Field(default=32, ge=1)
    split_seed: int | None = Field(default=None, ge=0)
    num_samples: Annotated[int, Field(ge=1)] | Literal["auto"] = 200
    min_reliability: float = Field(default=0.8, gt=0, lt=1)
    max_num_samples: int = Field(default=400, ge=2)
    sketch: Literal["count_sketch", "stride", "exact"] = "count_sketch"
    sketch_dim: int = Field(default=65536, ge=16)
    sketch_by_layer: bool = False
    stride: int = Field(default=5, ge=1)
    reduction: Literal["token_mean", "example_mean"] = "token_mean"
    center: Literal["column", "none", "double"] = "column"
    balance: Literal["tokens", "examples", "datasets"] = "tokens"
    axes: Literal["global", "local"] = "global"
    tokens_per_batch: int = Field(default=2048, ge=1)
    low_memory: bool | None = None
    gradient_checkpointing: bool = False
    debias: Literal["none", "split_half"] = "none"
    seed: int = Field(default=0, ge=0)


class MergeSection(Section):
    """How the groups become one model.

    Args:
        engine: `safetensors` (streaming, key-checked) or `mergekit`.
        weights (`str`, *optional*, defaults to `"tokens"`): `tokens`, `loss_tokens`, `uniform`, or a YAML file that
            maps group to weight.
        out_dtype (`str`, *optional*): of the merged weights. Default: the base's.
        adapters: of LoRA groups, `dense` (a full checkpoint), `concat` (an adapter of summed rank; both are exact) or
            `svd` (an adapter of rank `svd_rank`).
        svd_rank (`int`, *optional*): rank of the merged adapter; required with `svd`.
        method (`str`, *optional*, defaults to `"linear"`): one of mergekit's, where `engine` is `mergekit`: `ties`,
            `dare_ties`, `slerp`, `karcher`, …
        parameters (`dict`, *optional*): of the method, by mergekit's names, such as `density`.
        interpolate_to_init (`float`, *optional*, defaults to `1.0`): α of θ0 + α (θ̄ − θ0), as WARP has it: below 1 the
            merged model lies nearer to the base, above 1 (up to 2) beyond the mean.
    """

    engine: Literal["safetensors", "mergekit"] = "safetensors"
    weights: str = "tokens"
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    adapters: Literal["dense", "concat", "svd"] = "dense"
    svd_rank: int | None = Field(default=None, ge=1)
    method: str = "linear"
    parameters: dict[str, Any] = {}
    interpolate_to_init: float = Field(default=1.0, gt=0, le=MAX_INTERPOLATION, allow_inf_nan=False)


class RunSection(Section):
    """How `merit run` goes; no part of any plan.

    Args:
        rounds (`int`, *optional*, defaults to `1`): plan, train and merge so many times; each round starts from what
            the one before has merged, and trains on its own share of the rows. Together they train what one does.
        replan (`bool`, *optional*, defaults to `False`): measure gradients and split anew at the base of every round
            after the first. Default: all rounds keep the groups of the first.
    """

    rounds: int = Field(default=1, ge=1)
    replan: bool = False


class HubSection(Section):
    """Where `merit run` publishes what it made.

    Args:
        push (`bool`, *optional*, defaults to `False`): upload plan, groups and merged model when all are done.
        namespace (`str`, *optional*): user or organisation. Default: the token's owner.
        private (`bool`, *optional*, defaults to `True`): visibility of repos that do not exist yet.
        license (`str`, *optional*): of the merged model. Default: what follows from base and data; where that is not
            clear, the push is refused until this is given.
    """

    push: bool = False
    namespace: str | None = None
    private: bool = True
    license: str | None = None
