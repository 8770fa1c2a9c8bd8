"""Gates side by side: what each kind of probe tells apart, and how much the prompts matter.

All read the same hidden states of the shipped prompts, cross-validated: a matched pair is always in
one fold, and every score is of a prompt that its probe has not seen. With --harmful and --benign
files the probes are also tried on prompts of other people.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor

from calibration.capture import WorkFolder, capture
from calibration.config import CalibrationConfig
from calibration.gate_fit import Labelled, Messages, balanced, fit_probe, template_window
from calibration.progress import Silent
from calibration.prompts import Prompt, load_prompts, shipped_prompts
from calibration.statistics import auroc, share_interval
from calibration.transformers_subject import load_subject
from cli.memory import keep_freed_memory
from cli.models import resolve_model

FOLDS = 5
Score = Callable[[Labelled, Labelled, Labelled], list[Tensor]]
"""Train on the first, choose on the second; scores of each of the others."""


def main() -> int:
    """Fit every gate on every fold and print what it separates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--layer", type=int, default=10, help="that all of them read")
    parser.add_argument("--harmful", type=Path, nargs="*", default=[])
    parser.add_argument("--benign", type=Path, nargs="*", default=[])
    parser.add_argument("--most", type=int, default=400, help="prompts of each of these sides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/gates.json"))
    args = parser.parse_args()
    keep_freed_memory()
    subject = load_subject(CalibrationConfig(model=resolve_model(args.model)))
    window = template_window(len(subject.suffix_ids))
    others = [p for f in args.harmful for p in load_prompts(f, label="harmful")][: args.most]
    others += [p for f in args.benign for p in load_prompts(f, label="benign", stratum="hard")][
        : args.most
    ]

    with tempfile.TemporaryDirectory() as folder:

        def read(name: str, prompts: Sequence[Prompt]) -> Labelled:
            work = WorkFolder(Path(folder), "0" * 16)
            at = [args.layer]
            return capture(subject, prompts, at, at, 32, work, name, Silent())

        data = read("shipped", list(shipped_prompts()))
        public = read("public", others) if others else None
    folds = fold_of(data.prompts, args.seed)
    found = {}
    for name, fit in gates(args.layer, window, args.seed).items():
        found[name] = judged(data, public, folds, fit, args.seed)
        print(name, json.dumps(found[name]), flush=True)
    for share in (0.125, 0.25, 0.5):
        fit = gates(args.layer, window, args.seed)["attention, hidden layer"]
        name = f"attention, hidden layer, on {share:g} of the prompts"
        found[name] = judged(data, public, folds, fit, args.seed, share)
        print(name, json.dumps(found[name]), flush=True)
    result = {
        "gates": found,
        "folds": FOLDS,
        "layer": args.layer,
        "n": {
            "harmful": int(data.harmful.sum()),
            "hard benign": int(data.mask("benign", "hard").sum()),
            "ordinary benign": int(data.mask("benign", "ordinary").sum()),
        },
        "n_public": None
        if public is None
        else {"harmful": int(public.harmful.sum()), "benign": int((~public.harmful).sum())},
        "model": args.model,
        "seed": args.seed,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def gates(layer: int, window: tuple[int, ...], seed: int) -> dict[str, Score]:
    """Name → gate."""

    def template(data: Labelled) -> Tensor:
        return data.template(layer, window)

    def message(data: Labelled) -> Tensor:
        return data.message(layer)

    def both(data: Labelled) -> Tensor:
        return torch.cat([message(data), template(data)], 1)

    def sklearn(read: Callable[[Labelled], Tensor], *steps: object) -> Score:
        def fit(train: Labelled, _: Labelled, *unseen: Labelled) -> list[Tensor]:
            model = make_pipeline(
                StandardScaler(),
                *steps,
                LogisticRegression(C=1e-2, max_iter=500, random_state=seed),
            )
            weights = {"logisticregression__sample_weight": balanced(train)}
            model.fit(read(train).numpy(), train.harmful.numpy(), **weights)
            return [torch.tensor(model.decision_function(read(d).numpy())) for d in unseen]

        return fit

    def perceptron(train: Labelled, _: Labelled, *unseen: Labelled) -> list[Tensor]:
        model = make_pipeline(
            StandardScaler(),
            MLPClassifier((32,), alpha=10.0, early_stopping=True, max_iter=100, random_state=seed),
        )
        model.fit(both(train).numpy(), train.harmful.numpy())
        return [torch.tensor(model.predict_proba(both(d).numpy())[:, 1]) for d in unseen]

    def attention(train: Labelled, validation: Labelled, *unseen: Labelled) -> list[Tensor]:
        probe = fit_probe(train, validation, [layer], window, seed)
        return [probe.scores(d) for d in unseen]

    def strange(train: Labelled, validation: Labelled, *unseen: Labelled) -> list[Tensor]:
        """The attention probe's score and how far a prompt lies from benign ones (one class)."""
        probe = fit_probe(train, validation, [layer], window, seed)
        reduce = make_pipeline(StandardScaler(), PCA(64, random_state=seed))
        points = reduce.fit_transform(both(train).numpy())
        benign = LedoitWolf().fit(points[~train.harmful.numpy()])

        def features(d: Labelled) -> Tensor:
            away = benign.mahalanobis(reduce.transform(both(d).numpy())) ** 0.5
            return torch.stack([probe.scores(d), torch.tensor(away).float()], 1)

        model = make_pipeline(StandardScaler(), LogisticRegression())
        weights = {"logisticregression__sample_weight": balanced(validation)}
        model.fit(features(validation).numpy(), validation.harmful.numpy(), **weights)
        return [torch.tensor(model.decision_function(features(d).numpy())) for d in unseen]

    return {
        "linear, template tokens": sklearn(template),
        "linear, mean over the message": sklearn(message),
        "linear, both": sklearn(both),
        "low-rank quadratic (24), both": sklearn(
            both, PCA(24, random_state=seed), PolynomialFeatures(2), StandardScaler()
        ),
        "small MLP, both": perceptron,
        "attention, hidden layer": attention,
        "attention, hidden layer, one-class distance on top": strange,
    }


def judged(
    data: Labelled,
    public: Labelled | None,
    folds: Tensor,
    fit: Score,
    seed: int,
    share: float = 1.0,
) -> dict[str, object]:
    """Fit on all folds but one, score that one; scores of public prompts are averaged."""
    began = time.perf_counter()
    scores = torch.empty(len(data.prompts))
    elsewhere = torch.zeros(len(public.prompts) if public else 0)
    for fold in range(FOLDS):
        seen = (folds != fold).nonzero().flatten()
        chance = random.Random(seed)  # noqa: S311 - no secret: which prompts are left out
        groups = sorted({group_of(data.prompts[i]) for i in seen.tolist()})
        chance.shuffle(groups)
        kept = groups[: round(share * len(groups))]
        chosen_on = set(kept[: len(kept) // 6])
        trained_on = set(kept) - chosen_on
        names = [group_of(p) for p in data.prompts]
        train = part(data, [i for i in seen.tolist() if names[i] in trained_on])
        validation = part(data, [i for i in seen.tolist() if names[i] in chosen_on])
        unseen = (folds == fold).nonzero().flatten()
        found = fit(train, validation, part(data, unseen.tolist()), *([public] if public else []))
        scores[unseen] = found[0].float()
        if public:
            elsewhere += found[1].float() / FOLDS
    harmful = scores[data.harmful]
    result: dict[str, object] = {"seconds": round(time.perf_counter() - began, 1)}
    for stratum in ("ordinary", "hard"):
        benign = scores[data.mask("benign", stratum)]
        result[f"auroc_{stratum}"] = auroc(harmful, benign, seed, 200).model_dump()
        for percent in (1, 5, 10):
            limit = float(benign.double().quantile(1 - percent / 100))
            caught = share_interval(int((harmful > limit).sum()), len(harmful))
            result[f"caught_at_{percent}_percent_of_{stratum}"] = caught.model_dump()
    if public:
        area = auroc(elsewhere[public.harmful], elsewhere[~public.harmful], seed, 200)
        result["auroc_public"] = area.model_dump()
    return result


def group_of(prompt: Prompt) -> str:
    """What must stay in one fold."""
    return prompt.pair_id or prompt.id


def fold_of(prompts: Sequence[Prompt], seed: int) -> Tensor:
    """(n,) int64: the fold of each prompt."""
    groups = sorted({group_of(prompt) for prompt in prompts})
    random.Random(seed).shuffle(groups)  # noqa: S311 - no secret
    fold = {group: i % FOLDS for i, group in enumerate(groups)}
    return torch.tensor([fold[group_of(prompt)] for prompt in prompts])


def part(data: Labelled, rows: Sequence[int]) -> Labelled:
    """Some of the prompts."""
    at = torch.tensor(rows)
    messages = data.messages
    if messages is not None:
        starts = messages.lengths.cumsum(0) - messages.lengths
        tokens = torch.cat(
            [torch.arange(int(starts[i]), int(starts[i] + messages.lengths[i])) for i in rows]
        )
        hidden = {layer: states[tokens] for layer, states in messages.hidden.items()}
        messages = Messages(hidden, messages.lengths[at])
    return replace(
        data, prompts=[data.prompts[i] for i in rows], hidden=data.hidden[at], messages=messages
    )


if __name__ == "__main__":
    sys.exit(main())
