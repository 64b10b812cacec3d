"""From judgments to the content of report.json: figures of each judge, on all questions and on each benchmark."""

import dataclasses
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from conj.data.benchmarks import BENCHMARKS
from conj.data.prompts import question_of, question_text
from conj.sample.evaluation import aggregation, scores


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A judge's judgments of its prompts."""

    prompts: list[dict]  # those that it was asked
    rows: list[dict]
    is_part: bool = False  # only some rows or subsets of the data
    seconds_per_judgment: float | None = None  # not known of judgments that others made


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A judge's choices as arrays, question by question, Q of them."""

    samples: np.ndarray  # (Q, 2, n) int: choices as in conj.sample.evaluation.scores, by order and sample
    labels: np.ndarray  # (Q,) int
    longer: np.ndarray  # (Q,) int
    subsets: np.ndarray  # (Q,) of texts
    clusters: np.ndarray  # (Q,) int: which questions are the same text, and drawn together
    probability: np.ndarray  # (Q,) float: that answer 1 is better, mean over what is known; NaN: nothing is

    def of(self, places) -> "Choices":
        """Those of some questions: their places, or a mask."""
        return Choices(**{name: values[places] for name, values in vars(self).items()})

    def choices(self) -> np.ndarray:  # (Q, 2)
        return scores.majority(self.samples)

    def ratios(self, undecided_points: float = 0.5) -> scores.Ratios:
        ratios = scores.figure_ratios(self.choices(), self.labels, self.longer, undecided_points)
        judged = (self.samples != scores.NOT_JUDGED).sum((1, 2))
        # A drawn vote of judgments that all state a verdict is undecided, not unparsed.
        return ratios | {"unparsed": ((self.samples == scores.UNPARSED).sum((1, 2)), judged)}

    def judged_by(self, other: "Choices") -> "Choices":
        """With those orders alone that another judge of the same questions has judged too."""
        absent = (other.samples == scores.NOT_JUDGED).all(2, keepdims=True)
        return dataclasses.replace(self, samples=np.where(absent, scores.NOT_JUDGED, self.samples))


def score_all(judged: dict[str, Judged], num_resamples: int, seed: int) -> dict:
    """The content of report.json: each judge's figures, those of each benchmark, section and subset, and how the judges
    of the same questions differ from the first of them."""
    arrays = {name: to_arrays(entry) for name, entry in judged.items()}
    judges = {name: score_judge(judged[name], arrays[name], num_resamples, seed) for name in judged}
    first, *others = judged
    compared = {
        name: compare_judges(*((judged[one], arrays[one]) for one in (first, name)), num_resamples, seed)
        for name in others
    }
    comparisons = [{"judge": name, "against": first} | changes for name, changes in compared.items() if changes]
    return {"judges": judges, "comparisons": comparisons, "num_resamples": num_resamples}


def compare_judges(
    first: tuple[Judged, Choices], other: tuple[Judged, Choices], num_resamples: int, seed: int
) -> dict | None:
    """`other` minus `first` on the questions and orders that both have judged, see `scores.compare`; under `subsets` the same of
    each subset, by benchmark or data set. None where they have judged nothing alike."""
    places = {row["id"]: i for i, row in enumerate(first[0].prompts)}
    common = [(places[row["id"]], i) for i, row in enumerate(other[0].prompts) if row["id"] in places]
    if not common:
        return None
    one, two = (arrays.of(list(of)) for (_, arrays), of in zip((first, other), zip(*common)))
    one, two = one.judged_by(two), two.judged_by(one)
    if (one.samples == scores.NOT_JUDGED).all():  # each in an order that the other has not
        return None

    def compare(of) -> dict:
        pair = (choices.of(of) for choices in (one, two))
        return scores.compare(*(choices.ratios() for choices in pair), num_resamples, seed, one.clusters[of])

    subsets = defaultdict(lambda: defaultdict(list))
    for i, (_, place) in enumerate(common):
        subsets[source_of(other[0].prompts[place])][one.subsets[i]].append(i)
    return compare(slice(None)) | {
        "subsets": {source: {subset: compare(of) for subset, of in parts.items()} for source, parts in subsets.items()}
    }


def source_of(prompt: dict) -> str:
    """The benchmark that a question is of, or else the data set."""
    return prompt["benchmark"] or prompt["source"]


def to_arrays(judged: Judged) -> Choices:
    """A prompt without a judgment did not fit the context: unparsed. Of published ones an order may be absent: not judged."""
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
        samples=samples, labels=np.array([row["label"] or scores.TIE for row in prompts]), probability=mean,
        longer=np.where(lengths[:, 0] == lengths[:, 1], 0, lengths.argmax(1) + 1),
        subsets=np.array([row["subset"] or "all" for row in prompts], dtype=object),
        clusters=np.unique([question_text(question_of(row)) for row in prompts], return_inverse=True)[1],
    )  # fmt: skip


def score_judge(judged: Judged, arrays: Choices, num_resamples: int, seed: int) -> dict:
    """A judge's entry of report.json."""
    made = {row["id"] for row in judged.rows}
    tokens = [len(row["token_ids"]) if "token_ids" in row else row.get("completion_tokens") for row in judged.rows]
    rungs = Counter(row["rung"] for row in judged.rows)
    several = arrays.samples.shape[-1] > 1
    figures = scores.summarize(arrays.ratios(), num_resamples, seed, arrays.clusters)
    votes = scores.vote_curve(arrays.samples, arrays.labels, num_resamples, seed, arrays.clusters) if several else []
    figures |= {
        "num_judgments": len(judged.rows), "overlong": sum(row["id"] not in made for row in judged.prompts),
        "rungs": {rung: count / len(judged.rows) for rung, count in rungs.most_common()},
        "tokens_per_judgment": None if None in tokens or not tokens else float(np.mean(tokens)),
        "dollars": sum(row["dollars"] for row in judged.rows) if all("dollars" in row for row in judged.rows) else None,
        "votes": votes, "probability": scores.calibrate(arrays.probability, arrays.labels),
    }  # fmt: skip
    places = defaultdict(list)
    for i, row in enumerate(judged.prompts):
        places[source_of(row)].append(i)
    figures["benchmarks"] = {
        name: score_benchmark(name, [judged.prompts[i] for i in of], arrays.of(of), num_resamples, seed, judged.is_part)
        for name, of in places.items()
    }
    return figures


def score_benchmark(name: str, prompts: list, arrays: Choices, num_resamples: int, seed: int, is_part: bool) -> dict:
    """A benchmark's entry: its figures over all questions and over each subset's, its sections and its score as its authors
    add them up; of data that are no benchmark, the accuracy."""
    known = BENCHMARKS.get(name)
    members = {subset: arrays.subsets == subset for subset in sorted(set(arrays.subsets))}
    entry = scores.summarize(arrays.ratios(), num_resamples, seed, arrays.clusters)
    is_part &= known is None or not known.num_rows  # else official numbers of rows say which sections are whole
    accuracy = shown(entry["accuracy"], entry["accuracy_ci95"], is_part)
    entry |= {"title": known.title if known else name, "partial": is_part, "score": accuracy, "sections": {}}
    parts = {subset: arrays.of(of) for subset, of in members.items()}
    entry["subsets"] = {s: scores.summarize(p.ratios(), num_resamples, seed, p.clusters) for s, p in parts.items()}
    if known is None:
        return entry
    points = arrays.ratios(known.undecided_points)["accuracy"]
    if known.net_of_orders:
        points = aggregation.right_on_balance(arrays.choices(), arrays.labels), np.ones(len(prompts))
    ratios = {subset: (points[0] * of, points[1] * of) for subset, of in members.items()}
    drawn = scores.bootstrap(ratios, num_resamples, seed, arrays.clusters, stratified=True)
    values, draws = {subset: scores.figure(ratio) for subset, ratio in ratios.items()}, {}
    sections = aggregation.sections_of(name, {subset: int(of.sum()) for subset, of in members.items()})
    for section in sections:
        draws[section.name] = aggregation.section_value(section, drawn)
        between = None if draws[section.name] is None else scores.interval(draws[section.name])
        found = shown(aggregation.section_value(section, values), between, section.partial or is_part)
        entry["sections"][section.name] = found | {"n": section.n}
    known_subsets = set().union(*(section.weights for section in sections))
    entry["in_no_section"] = int(sum(of.sum() for subset, of in members.items() if subset not in known_subsets))
    scored = [entry["sections"][section] for section in aggregation.scored_sections(name)]
    values = [section["value"] for section in scored]
    entry["partial"] = any(section["partial"] for section in scored)
    entry["score"] = shown(None, None, partial=True)
    if None not in values:
        between = scores.interval(sum(draws[section] for section in aggregation.scored_sections(name)) / len(scored))
        entry["score"] = shown(float(np.mean(values)), between, entry["partial"])
    if all("votes" in row for row in prompts):
        entry["annotators"] = agreement_with_annotators([row["votes"] for row in prompts], arrays.choices())
    return entry


def shown(value: float | None, between: list[float] | None, partial: bool) -> dict:
    return {"value": value, "ci95": between if value is not None else None, "partial": partial}


def agreement_with_annotators(votes: list[list[int]], choices: np.ndarray) -> dict[str, float]:
    """The mean over the judged orders of the shares that `annotator_agreement` gives."""
    said = {1: 1, 2: 2, scores.TIE: 0, scores.UNPARSED: None}
    orders = [order for order in choices.T.tolist() if order[0] != scores.NOT_JUDGED]
    found = [aggregation.annotator_agreement(votes, [said[choice] for choice in order]) for order in orders]
    return {name: float(np.mean([shares[name] for shares in found])) for name in found[0]}
