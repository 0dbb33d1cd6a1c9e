"""A point for every dataset by what its texts say, without any gradient: what a c-BTM-like split clusters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from merit_hf.config import MeritError
from merit_hf.gradients import sample_indices
from merit_hf.mixture import PreparedDataset
from merit_hf.seeds import seed_of

# Texts of a dataset, and dimensions of the SVD: enough for a mean, and what c-BTM takes.
_NUM_TEXTS, _NUM_COMPONENTS, _BATCH = 200, 100, 32


def dataset_texts(dataset: PreparedDataset, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[str]:
    """Up to 200 examples as the model reads them, cut as it does, without special tokens; drawn by (seed, name)."""
    chosen = sample_indices(len(dataset.distinct), _NUM_TEXTS, seed_of(seed, "texts", dataset.name))
    return [
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in dataset.distinct.select(chosen)["input_ids"]
    ]


def tfidf_points(texts: Sequence[Sequence[str]], seed: int) -> np.ndarray:
    """Unit points [T, dim]: the mean over a dataset's examples of their TF-IDF vectors, reduced by an SVD.

    Raises:
        MeritError: the texts hold no word.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    owners = np.repeat(np.arange(len(texts)), [len(part) for part in texts])
    try:
        # Characters within words, so that every language and notation has terms.
        terms = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), max_features=50_000, sublinear_tf=True)
        vectors = terms.fit_transform([text for part in texts for text in part])
    except ValueError as error:
        raise MeritError(f"plan.split=kmeans_text: {error}. The datasets' texts are empty.") from error
    size = min(_NUM_COMPONENTS, min(vectors.shape) - 1)
    if size >= 1:
        vectors = TruncatedSVD(size, algorithm="arpack", random_state=seed).fit_transform(vectors)
    return _unit(_means(np.asarray(vectors if size >= 1 else vectors.todense()), owners, len(texts)))


def encoder_points(texts: Sequence[Sequence[str]], folder: Path) -> np.ndarray:
    """Unit points [T, dim]: the mean over a dataset's examples of the encoder's unit embeddings.

    An embedding is the mean of the last hidden states over the tokens that are no padding, as sentence encoders are
    trained with.

    Raises:
        MeritError: no encoder can be loaded from `folder`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise MeritError(f"{folder}: no text encoder can be loaded: {' '.join(str(error).split())}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device)
    flat = [text for part in texts for text in part]
    limit = min(512, getattr(model.config, "max_position_embeddings", 512))
    found = []
    with torch.no_grad():
        for start in range(0, len(flat), _BATCH):
            batch = tokenizer(
                flat[start : start + _BATCH], padding=True, truncation=True, max_length=limit, return_tensors="pt"
            ).to(device)
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            hidden = model(**inputs).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            found.append(((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).double().cpu().numpy())
    owners = np.repeat(np.arange(len(texts)), [len(part) for part in texts])
    return _unit(_means(_unit(np.concatenate(found)), owners, len(texts)))


def _means(vectors: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    return np.stack([vectors[owners == number].mean(axis=0) for number in range(count)])


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1.0))
