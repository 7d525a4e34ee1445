"""The bench's JSON -> the page of docs/results: tables, examples, and how to read them.

Knows rows; must not know attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import mean
from typing import Any

Row = dict[str, Any]
_FIGURES = "<!-- figures: bench/results/leakage.json#{} -->"
"""Says, for ``tests/test_figures.py``, which part of the file holds a passage's figures."""
_OPENING = """# What leaks

What an honest but curious server reads out of the updates that it is sent, and what anybody reads out of the adapter
that a run ends with. Clients attacked are those of a run's second round, LoRA of rank 8 on q, k, v and o, base models
in float32: in the first round B is zero, and so is A's gradient. The attacker knows base model, global adapter,
codec, side information, recipe and channel, and has public text, of which it makes updates of its own to set its
thresholds by. This page is written by the bench:

```sh
python -m bench.leakage
```

**Coding is no protection.** It lowers some of these figures and not others, nobody has proved anything of it, and an
attack that fails here may succeed with more work: sparse recovery, below, finds what the published span check does not.
What bounds leakage whatever the attack is the noise of differential privacy, at a price that the last table shows.
"""
_QUICK = """
*These figures are of `--quick`, which tries every part once: they mean nothing.*
"""
_CHANNELS = """
{figures}
*Dense*: the update in float32. *Coded*: by `learned` with the artifact that ships with the project, first message,
decoded as the server does. *epsilon*: all of the update cut to the median norm of public ones, Gaussian noise of
{noise} times that on every value (delta {delta}, one release), then coded. *Mean*: of the client's update and public
clients', in float32, which is what a secure aggregate shows.
"""
_TOKENS = """
## Which tokens

{figures}
Each row of A's gradient is a sum of the layer's inputs, and the first layer's inputs are the tokens' normed embeddings.
*Span check*: how much of each of the vocabulary's tokens lies in the rows' span (DAGER, Petrov et al. 2024).
*Sparse recovery*: the rows as sums of few tokens, which goes on where the tokens are more than the rows (Davies and
Eldar 2012; not among the published attacks on text). Both look at tokens in coordinates fitted to the channel, with
thresholds from the attacker's own updates. Shares of the true distinct tokens that were found, in brackets of the
found ones that are true; *nothing* guesses frequent tokens without seeing an update, so that only what is above it
was leaked. *Error* is the energy that the channel took from the update or added to it, over the update's. A *delta*
is of eight AdamW steps.
"""
_CONTROL = """
### Where the attack is exact

{figures}
The same with a rank above the number of tokens and uncoded gradients, as in DAGER's own figures, which use rank 256:
first and second layer, no language model. It shows that the attack is the published one, and works. Where ROUGE is 1
and a sentence not exact, its last full stop is missing: the model is so sure of the end of text behind it that its
gradient is below float32's rounding.
"""
_SENTENCES = """
## Whole sentences

{figures}
One sentence a client, its length told to the attacker. *Second layer and language model*: the tokens of both attacks
above, in the order that the second layer's span and the base model like best. *Gradient matching*: LAMP (Balunovic et
al. 2022) over mixtures of candidate tokens, then moves of whole tokens, ten seconds a sentence on the embedded model
and a minute on SmolLM2 ({steps}); *from the above*: the moves alone, from the first attack's sentence. A dash: not
tried. Means over {count} sentences, ROUGE-1 / ROUGE-2, then the share that is exact to the character.
"""
_LEARNED = """
## An attacker that learns

{figures}
A network from the decoded update to its tokens, trained through the channel on {count} updates of public sentences
(Learning to Invert, Wu et al. 2023): embedded model, gradients of one sentence, {trials} of them attacked.
"""
_MEMBERS = """
## Who was trained on

{figures}
Told from the trained adapter alone: {members} windows of source code that were trained on, and as many of the same
files that were not. *Loss*: Yeom et al. 2018. *Beside the base model*: how far the adapter lowers the base model's
loss (Watson et al. 2022; the base model stands where LiRA has shadow models). Embedded model, {clients} clients in
each of {rounds} rounds, each window seen {epochs} times a round. A run in which a text is seen once among many
remembers less. Noise is each client's own, for epsilon 8 of the whole run.
"""
_READING = """
## How to read it

{figures}

{findings}- What counts is the distance from *nothing*. Where a figure lies there, this attack found nothing; that is no
  bound.
- Of a mean, the other clients' tokens count as false. They are no less somebody's.
- On SmolLM2 *nothing* finds much of one sentence, as the worked answers often begin with the same one. Whole sentences
  were therefore attacked that begin like no public one.
- Few trials: a share of the tokens' tables is a mean over {trials}, so that differences of 0.1 are chance.
- Single sentences are the worst case on purpose. A client's real update is of hundreds of windows, for which none of
  these attacks was tried.
- Matching was given seconds a sentence. That it falls behind the algebra of the first layers says that it had too
  little, not that it is weaker. The attacker that learns had few updates, too; its table is to be held against
  *gradient of 1* of the embedded model above.
- Noise at one client drowns the update with the text. What noise costs where many clients share it is not measured
  here.
"""


def page_of(results: Row) -> str:
    """The whole page, Markdown; without the sections that were not run."""
    sections: dict[str, Row] = results["sections"]
    sizes, means = results["sizes"], means_of(sections)
    tell: dict[str, Callable[[list[Row]], Iterable[str]]] = {
        "tokens": lambda rows: [_TOKENS.format(figures=_rows_of("tokens")), *_token_tables(rows)],
        "control": lambda rows: [
            _CONTROL.format(figures=_FIGURES.format("means.control")),
            _control_table(means["control"]),
        ],
        "sentences": lambda rows: [
            _SENTENCES.format(figures=_FIGURES.format("means.sentences"), **_effort(sizes)),
            *_sentence_tables(means["sentences"]),
            _examples(rows),
        ],
        "learned": lambda rows: [
            _LEARNED.format(figures=_rows_of("learned"), count=sizes["learned_from"], trials=rows[0]["trials"]),
            _learned_table(rows),
        ],
        "members": lambda rows: [
            _MEMBERS.format(figures=_rows_of("members"), members=rows[0]["members"], **sizes["federation"]),
            _members_table(rows),
        ],
    }
    quick = any(section["quick"] for section in sections.values())
    parts = [_OPENING, _QUICK if quick else "", _CHANNELS.format(**_noise(results["noise"]))]
    for name, told in tell.items():
        parts += told(sections[name]["rows"]) if name in sections else []
    findings = "".join(f"- {line}\n" for line in _findings(means.get("tokens", [])))
    trials = sorted({row["trials"] for row in sections["tokens"]["rows"]}) if "tokens" in sections else []
    reading = _READING.format(
        figures=_FIGURES.format("means.tokens"), trials=" to ".join(map(str, trials)), findings=findings
    )
    return "".join([*parts, reading, _made_with(sections)])


def means_of(sections: dict[str, Row]) -> dict[str, list[Row]]:
    """Where the page tells of several rows together: what they come to, of every section that was run. Of tokens it is
    the best attack's F1 behind each channel, over all updates."""
    means: dict[str, Callable[[list[Row]], list[Row]]] = {
        "tokens": lambda rows: [
            {"model": model, "channel": channel, "f1": _best_f1(mine)}
            for (model, channel), mine in _grouped(rows, "model", "channel")
        ],
        "control": lambda rows: _means(
            rows, ("model", "rank", "sentences"), ("true_tokens", "recall", "precision", "rouge1", "rouge2", "exact")
        ),
        "sentences": lambda rows: _means(rows, ("model", "update", "channel", "attack"), ("rouge1", "rouge2", "exact")),
    }
    return {name: tell(sections[name]["rows"]) for name, tell in means.items() if name in sections}


def _means(rows: Sequence[Row], same: Sequence[str], figures: Sequence[str]) -> list[Row]:
    return [
        dict(zip(same, values, strict=True)) | {key: mean(row[key] for row in mine) for key in figures}
        for values, mine in _grouped(rows, *same)
    ]


def _rows_of(section: str) -> str:
    return _FIGURES.format(f"sections.{section}.rows")


def _noise(rows: Sequence[Row]) -> dict[str, str]:
    said = [f"{row['standard_deviation_over_clip']:.2f} (epsilon {row['epsilon']:g})" for row in rows]
    return {"figures": _FIGURES.format("noise"), "noise": " or ".join(said), "delta": f"{rows[0]['delta']:g}"}


def _effort(sizes: Row) -> dict[str, str]:
    said = [
        f"{effort['steps']} steps and {effort['moves']} moves on {name}" for name, effort in sizes["effort"].items()
    ]
    counts = [f"{count} ({name})" for name, count in sizes["sentences"].items()]
    return {"steps": ", ".join(said), "count": " and ".join(counts)}


def _token_tables(rows: Sequence[Row]) -> Iterator[str]:
    """One a model and attack: updates down, channels across."""
    for model in _values(rows, "model"):
        mine = [row for row in rows if row["model"] == model]
        blind = {_update_of(row): row for row in mine if row["channel"] == "nothing"}
        channels = [channel for channel in _values(mine, "channel") if channel != "nothing"]
        updates = list(blind)
        errors = {(_update_of(row), row["channel"]): row.get("error_energy", 0.0) for row in mine}
        for attack in [attack for attack in _values(mine, "attack") if attack != "most frequent"]:
            found = {(_update_of(row), row["channel"]): row for row in mine if row["attack"] == attack}
            lines = [
                [f"{update} ({blind[update]['true_tokens']:.0f} tokens)", _shares(blind[update])]
                + [_shares(found[update, channel]) for channel in channels]
                for update in updates
            ]
            yield f"\n**{model}, {attack}**\n" + _table(["update", "nothing", *channels], lines)
        lines = [[update, *(f"{errors[update, channel]:.3g}" for channel in channels)] for update in updates]
        yield f"\n**{model}, error**\n" + _table(["update", *channels], lines)


def _findings(means: Sequence[Row]) -> Iterator[str]:
    """What the tokens' tables come to, a line a model."""
    for (model,), mine in _grouped(means, "model"):
        said = "; ".join(f"{row['f1']:.2f} {row['channel']}" for row in mine)
        yield f"{model}: F1 of the tokens, mean over the updates, of each the attack that does better: {said}."


def _best_f1(rows: Sequence[Row]) -> float:
    return mean(max(map(_f1, of_update)) for _, of_update in _grouped(rows, "update", "sentences"))


def _f1(row: Row) -> float:
    both = row["recall"] + row["precision"]
    found: float = 2 * row["recall"] * row["precision"] / both if both else 0.0
    return found


def _control_table(means: Sequence[Row]) -> str:
    lines = [
        [row["model"], str(row["rank"]), str(row["sentences"]), f"{row['true_tokens']:.0f}"]
        + [f"{row[key]:.2f}" for key in ("recall", "precision", "rouge1", "rouge2", "exact")]
        for row in means
    ]
    head = ["model", "rank", "sentences", "tokens", "recall", "precision", "ROUGE-1", "ROUGE-2", "exact"]
    return _table(head, lines)


def _sentence_tables(means: Sequence[Row]) -> Iterator[str]:
    """One a model and kind of update: channels down, attacks across."""
    for (model, kind), mine in _grouped(means, "model", "update"):
        attacks, told = _values(mine, "attack"), {(row["channel"], row["attack"]): row for row in mine}
        lines = [
            [channel, *(_rouges(told.get((channel, attack))) for attack in attacks)]
            for channel in _values(mine, "channel")
        ]
        yield f"\n**{model}, {kind}**\n" + _table(["channel", *attacks], lines)


def _examples(rows: Sequence[Row]) -> str:
    """What is read of one sentence behind every channel: the first of the last model, by the attack that does best on
    it."""
    model = _values(rows, "model")[-1]
    mine = [row for row in rows if row["model"] == model and row["update"] == "gradient"]
    parts = [
        f"\nTwo sentences of {model}'s, a gradient each, as they were and as the best of these attacks reads them:\n"
    ]
    for sentence in _values(mine, "sentence")[:2]:
        lines = [["*as it was*", f"`` {_shown(sentence)} ``"]]
        for channel in _values(mine, "channel"):
            tried = [row for row in mine if row["channel"] == channel and row["sentence"] == sentence]
            best = max(tried, key=lambda row: row["rouge1"] + row["rouge2"])
            lines.append([channel, f"`` {_shown(best['told'][0])} ``"])
        parts.append(_table(["channel", "sentence"], lines))
    return "".join(parts)


def _learned_table(rows: Sequence[Row]) -> str:
    lines = [[row["channel"], f"{row['recall']:.2f}", f"{row['precision']:.2f}"] for row in rows]
    return _table(["channel", "recall", "precision"], lines)


def _members_table(rows: Sequence[Row]) -> str:
    names = list(rows[0]["attacks"])
    head = ["run", "loss of others before", "after", "loss of members after"]
    head += [f"{name}: {figure}" for name in names for figure in ("AUC", "true positives at 1 % false")]
    lines = []
    for row in rows:
        losses = [f"{row[key]:.2f}" for key in ("loss_of_others_before", "loss_of_others", "loss_of_members")]
        figures = [
            f"{row['attacks'][name][key]:.2f}" for name in names for key in ("auc", "true_positives_at_1_percent")
        ]
        lines.append([row["channel"], *losses, *figures])
    return _table(head, lines)


def _made_with(sections: dict[str, Row]) -> str:
    minutes = sum(section["seconds"] for section in sections.values()) / 60
    made = [section["made_with"] for section in sections.values()]
    commits, dates = (", ".join(dict.fromkeys(one[key] for one in made)) for key in ("commit", "date"))
    return (
        f"\n*{minutes:.0f} minutes on one core beside other work; commit {commits}, {dates}, torch {made[0]['torch']}, "
        "rows in `bench/results/leakage.json`.*\n"
    )


def _update_of(row: Row) -> str:
    return f"{row['update']} of {row['sentences']}"


def _shares(row: Row) -> str:
    return f"{row['recall']:.2f} ({row['precision']:.2f})"


def _rouges(row: Row | None) -> str:
    return "-" if row is None else f"{row['rouge1']:.2f} / {row['rouge2']:.2f}, {row['exact']:.2f}"


def _shown(text: str) -> str:
    """On one line of a table, whatever the tokens are."""
    visible = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(visible.replace("|", "¦").replace("`", "'").split()) or "(nothing)"


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _grouped(rows: Sequence[Row], *keys: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
