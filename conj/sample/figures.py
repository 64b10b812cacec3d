"""From judgments to the content of report.json: figures of each judge, on all questions and on each benchmark."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from conj.data.benchmarks import BENCHMARKS, annotator_agreement, right_on_balance, scored_sections, sections_of
from conj.sample import scores


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A judge's judgments of its prompts."""

    prompts: list[dict]
    rows: list[dict]
    seconds_per_judgment: float | None = None  # not known of judgments that others made


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A judge's choices as arrays, question by question, Q of them."""

    samples: np.ndarray  # (Q, 2, n) int: choices as in conj.sample.scores, by order and sample
    labels: np.ndarray  # (Q,) int
    longer: np.ndarray  # (Q,) int
    subsets: np.ndarray  # (Q,) str
    probability: np.ndarray  # (Q,) float: that answer 1 is better, mean over what is known; NaN: nothing is

    def of(self, places) -> "Choices":
        """Those of some questions: their places, or a mask."""
        return Choices(**{name: values[places] for name, values in vars(self).items()})

    def choices(self) -> np.ndarray:  # (Q, 2)
        return scores.majority(self.samples)

    def ratios(self) -> scores.Ratios:
        return scores.figure_ratios(self.choices(), self.labels, self.longer)


def score_all(judged: dict[str, Judged], num_resamples: int, seed: int, *, is_part: bool) -> dict:
    """The content of report.json: each judge's figures, those of each benchmark, section and subset, and how the judges
    of the same questions differ from the first of them. `is_part`: only some rows or subsets of the data were asked for."""
    arrays = {name: to_arrays(entry) for name, entry in judged.items()}
    judges = {name: score_judge(judged[name], arrays[name], num_resamples, seed, is_part) for name in judged}
    first, *others = judged
    comparisons = []
    for name in others:
        places = {row["id"]: i for i, row in enumerate(judged[first].prompts)}
        common = [(places[row["id"]], i) for i, row in enumerate(judged[name].prompts) if row["id"] in places]
        if common:
            of_first, of_other = zip(*common)
            pair = arrays[first].of(list(of_first)).ratios(), arrays[name].of(list(of_other)).ratios()
            change = scores.compare(*pair, num_resamples, seed)
            comparisons.append({"judge": name, "against": first} | change)
    return {"judges": judges, "comparisons": comparisons, "num_resamples": num_resamples}


def to_arrays(judged: Judged) -> Choices:
    """A prompt that a judge of ours has no judgment of did not fit its context: unparsed. Published judgments may have one
    order only: the other is not judged."""
    rows = {(row["id"], row["order"], row["sample"]): row for row in judged.rows}
    orders = {row["order"] for row in judged.rows}
    num_samples = 1 + max((row["sample"] for row in judged.rows), default=0)
    prompts, spoken = judged.prompts, {1: 1, 2: 2, 0: scores.TIE, None: scores.UNPARSED}
    samples = np.full((len(prompts), 2, num_samples), scores.UNPARSED)
    probability = np.full((len(prompts), 2, num_samples), np.nan)
    for i, prompt in enumerate(prompts):
        for order in (1, 2):
            for sample in range(num_samples):
                row = rows.get((prompt["id"], order, sample), {"choice": None})
                samples[i, order - 1, sample] = spoken[row["choice"]]
                if row.get("p_first") is not None:
                    probability[i, order - 1, sample] = row["p_first"] if order == 1 else 1 - row["p_first"]
    for order in {1, 2} - orders:
        samples[:, order - 1] = scores.NOT_JUDGED
    lengths = np.array([[len(row["answer_1"]), len(row["answer_2"])] for row in prompts])
    known = ~np.isnan(probability)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, probability, 0).sum((1, 2)) / known.sum((1, 2))
    return Choices(
        samples=samples,
        labels=np.array([row["label"] or scores.TIE for row in prompts]),
        longer=np.where(lengths[:, 0] == lengths[:, 1], 0, lengths.argmax(1) + 1),
        subsets=np.array([row["subset"] or "all" for row in prompts]),
        probability=mean,
    )


def score_judge(judged: Judged, arrays: Choices, num_resamples: int, seed: int, is_part: bool) -> dict:
    """A judge's entry of report.json."""
    made = {row["id"] for row in judged.rows}
    tokens = [len(row["token_ids"]) if "token_ids" in row else row.get("completion_tokens") for row in judged.rows]
    rungs = Counter(row["rung"] for row in judged.rows)
    several = arrays.samples.shape[-1] > 1
    figures = scores.summarize(arrays.ratios(), num_resamples, seed)
    figures |= {
        "num_judgments": len(judged.rows),
        "overlong": sum(row["id"] not in made for row in judged.prompts),
        "rungs": {rung: count / len(judged.rows) for rung, count in rungs.most_common()},
        "tokens_per_judgment": None if None in tokens or not tokens else float(np.mean(tokens)),
        "dollars": sum(row["dollars"] for row in judged.rows) if all("dollars" in row for row in judged.rows) else None,
        "votes": scores.vote_curve(arrays.samples, arrays.labels, num_resamples, seed) if several else [],
        "probability": scores.calibrate(arrays.probability, arrays.labels),
    }
    places = defaultdict(list)
    for i, row in enumerate(judged.prompts):
        places[row["benchmark"] or row["source"]].append(i)
    figures["benchmarks"] = {
        name: score_benchmark(name, [judged.prompts[i] for i in of], arrays.of(of), num_resamples, seed, is_part)
        for name, of in places.items()
    }
    return figures


def score_benchmark(
    name: str, prompts: list[dict], arrays: Choices, num_resamples: int, seed: int, is_part: bool
) -> dict:
    """A benchmark's entry: its figures over all questions and over each subset's, its sections and its score as its authors
    add them up; of data that are no benchmark, the accuracy."""
    known = BENCHMARKS.get(name)
    subsets = {str(subset): arrays.of(arrays.subsets == subset) for subset in np.unique(arrays.subsets)}
    ratios = {subset: part.ratios() for subset, part in subsets.items()}
    entry = scores.summarize(arrays.ratios(), num_resamples, seed)
    is_part &= known is None or not known.num_rows  # else official numbers of rows say which sections are whole
    accuracy = shown(entry["accuracy"], entry["accuracy_ci95"], is_part)
    entry |= {"title": known.title if known else name, "partial": is_part, "score": accuracy, "sections": {}}
    entry["subsets"] = {subset: scores.summarize(ratio, num_resamples, seed) for subset, ratio in ratios.items()}
    if known is None:
        return entry
    points, less = {}, 0.5 - known.unparsed_points  # than our accuracy gives a judgment without a verdict
    for subset, ratio in ratios.items():
        points[subset] = ratio["accuracy"][0] - less * ratio["unparsed"][0], ratio["accuracy"][1]
    if known.net_of_orders:
        balance = {subset: right_on_balance(part.choices(), part.labels) for subset, part in subsets.items()}
        points = {subset: (right, np.ones(len(right))) for subset, right in balance.items()}
    draws = {}
    for section in sections_of(name, {subset: len(part.labels) for subset, part in subsets.items()}):
        value, draws[section.name] = scores.weighted_mean(section.weights, points, num_resamples, seed)
        found = shown(value, scores.interval(draws[section.name]), section.partial or is_part)
        entry["sections"][section.name] = found | {"n": section.n}
    scored = [entry["sections"][section] for section in scored_sections(name)]
    values = [section["value"] for section in scored]
    partial = any(section["partial"] for section in scored)
    mean = None if None in values else float(np.mean(values))
    between = scores.interval(sum(draws[section] for section in scored_sections(name)) / len(scored))
    entry |= {"partial": partial, "score": shown(mean, between, partial)}
    if all("votes" in row for row in prompts):
        entry["annotators"] = agreement_with_annotators([row["votes"] for row in prompts], arrays.choices())
    return entry


def shown(value: float | None, between: list[float] | None, partial: bool) -> dict:
    return {"value": value, "ci95": between if value is not None else None, "partial": partial}


def agreement_with_annotators(votes: list[list[int]], choices: np.ndarray) -> dict[str, float]:
    """The mean over the judged orders of the shares that `annotator_agreement` gives."""
    said = {1: 1, 2: 2, scores.TIE: 0, scores.UNPARSED: None}
    orders = [order for order in choices.T.tolist() if order[0] != scores.NOT_JUDGED]
    found = [annotator_agreement(votes, [said[choice] for choice in order]) for order in orders]
    return {name: float(np.mean([shares[name] for shares in found])) for name in found[0]}
