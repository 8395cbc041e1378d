"""Tables, checks and figure of learning.py, from the JSON that it writes."""

# ruff: noqa: TID253  (draws with matplotlib)

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from selfcorrect.evaluate.figures.curves import save
from selfcorrect.evaluate.figures.panels import PAGE_WIDTH, style
from selfcorrect.recipes.foundation.atomic_files import atomic_file, write_text

LOOKS: dict[str, dict[str, Any]] = {
    "PPO, separate critic": {"color": "#0072B2", "linestyle": "-"},
    "PPO, shared critic": {"color": "#56B4E9", "linestyle": (0, (5, 1.2))},
    "GRPO": {"color": "#D55E00", "linestyle": "-"},
    "GRPO, unscaled": {"color": "#E69F00", "linestyle": (0, (5, 1.2))},
}
TITLES = {"toy": "Toy with a known optimum", "society": "The society's reward model"}
# Set before seeds 0 to 2 were run: twice the optimum's KL; nats that cost half a deviation
KL_BOUNDS = {"toy": 2.0, "society": 10.0}  # the toy's in units of the optimum's KL
WINDOW = 5  # steps of the running mean in the figure
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEADER = (
    "| method | seed | score before | score after | score, last 5 steps | KL after | "
    "objective after | explained variance, last 10 steps | ended by EOS | CPU s a step |"
)

Run = dict[str, Any]


def closing_figures(run: Run, beta: float) -> dict[str, float | None]:
    """Return the table's row of a run; explained variance is None without a critic."""
    steps, before, after = run["steps"], run["before"], run["after"]
    kl = after.get("exact_kl", after.get("kl"))
    score = after.get("exact_score", after.get("score"))
    return {
        "before": before.get("exact_score", before.get("score")),
        "after": score,
        "last": fmean(step["score"] for step in steps[-5:]),
        "kl": kl,
        "objective": score - beta * kl,
        "explained": _mean([step["explained_variance"] for step in steps[-10:]]),
        "ended": fmean(step["ended_by_eos"] for step in steps[-5:]),
        "cpu": fmean(step["cpu_seconds"] for step in steps),
    }


def tables(results: dict[str, Any]) -> str:
    """Return Markdown: per problem a table of seeds and means by method, then the checks."""
    parts = [f"{results['date']}, {results['machine']}, {results['cpu_seconds']:.0f} CPU seconds."]
    for name, problem in results["problems"].items():
        facts = problem["facts"]
        parts.append(f"### {TITLES[name]}\n\n{_about(facts)}")
        lines = [HEADER, "|---|---|" + "---:|" * 8]
        for method, runs in _by_method(problem).items():
            rows = [closing_figures(run, facts["beta"]) for run in runs]
            for run, row in zip(runs, rows, strict=True):
                lines.append(_row(method, str(run["seed"]), list(row.values())))
            means = [_mean([row[key] for row in rows]) for key in rows[0]]
            lines.append(_row(f"**{method}**", "**mean**", means))
        parts.append("\n".join(lines))
        parts.append("\n".join(f"- {line}" for line in checks(name, problem)))
    return "\n\n".join(parts)


def checks(name: str, problem: dict[str, Any]) -> list[str]:
    """Return sentences on what PPO was expected to do, and on PPO against GRPO."""
    facts, runs_of = problem["facts"], _by_method(problem)
    bound = KL_BOUNDS[name] * (facts["optimum"]["exact_kl"] if "optimum" in facts else 1.0)
    rows = {
        method: [closing_figures(run, facts["beta"]) for run in runs]
        for method, runs in runs_of.items()
    }
    lines = []
    for method, runs in runs_of.items():
        if not method.startswith("PPO"):
            continue
        rises = sum(row["after"] > row["before"] for row in rows[method])  # type: ignore[operator]
        largest = max(step["kl"] for run in runs for step in run["steps"])
        explained = [row["explained"] for row in rows[method]]
        above = sum(value is not None and value > 0 for value in explained)
        lines.append(
            f"{method}: the reward rises in {rises} of {len(runs)} seeds; the KL is at most "
            f"{largest:.2f} nats in any batch, {'within' if largest <= bound else 'BEYOND'} the "
            f"bound of {bound:.1f}; the critic's explained variance is above zero in {above} of "
            f"{len(runs)} seeds."
        )
    if "optimum" in facts:
        best = facts["optimum"]["objective"]
        for method, closing in rows.items():
            shares = [(r["objective"] - r["before"]) / (best - r["before"]) for r in closing]  # type: ignore[operator]
            lines.append(
                f"{method}: {fmean(shares):.0%} of the way from the initial policy's objective to "
                f"the optimum's ({', '.join(f'{share:.0%}' for share in shares)})."
            )
    for grpo in (method for method in rows if not method.startswith("PPO")):
        for ppo in (method for method in rows if method.startswith("PPO")):
            pairs = zip(rows[ppo], rows[grpo], strict=True)
            gaps = [a["objective"] - b["objective"] for a, b in pairs]  # type: ignore[operator]
            lines.append(
                f"{ppo} against {grpo}: objective {fmean(gaps):+.3f}, higher in "
                f"{sum(gap > 0 for gap in gaps)} of {len(gaps)} seeds."
            )
    return lines


def _about(facts: dict[str, Any]) -> str:
    if "optimum" in facts:
        best = facts["optimum"]
        return (
            f"KL coefficient {facts['beta']}. The best policy has score {best['exact_score']:.3f}, "
            f"KL {best['exact_kl']:.3f} and objective **{best['objective']:.3f}**, exactly; scores "
            "before and after, KL and objective of every run are exact too."
        )
    return (
        f"KL coefficient {facts['beta']}; the reward model puts {facts['reward_accuracy']:.3f} of "
        "its held-out pairs in order. Scores are in standard deviations of the reward model's "
        "scores; before, after, KL and objective are of 512 prompts that training did not ask."
    )


def _by_method(problem: dict[str, Any]) -> dict[str, list[Run]]:
    methods: dict[str, list[Run]] = {}
    for run in problem["runs"]:
        methods.setdefault(run["method"], []).append(run)
    return methods


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _row(method: str, seed: str, values: list[float | None]) -> str:
    bold = "**" if seed.startswith("**") else ""
    cells = [f"{bold}{'–' if value is None else f'{value:.3f}'}{bold}" for value in values]
    return f"| {' | '.join([method, seed, *cells])} |"


# ---- figure and page ----------------------------------------------------------------------------


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write learning.png and learning.svg: objective or score, KL, explained variance."""
    with style():
        problems = results["problems"]
        figure = Figure(figsize=(PAGE_WIDTH, 2.35 * len(problems) + 0.3), layout="constrained")
        grid = figure.subplots(len(problems), 3, squeeze=False)
        for axes, (name, problem) in zip(grid, problems.items(), strict=True):
            optimum = problem["facts"].get("optimum")
            first = "objective" if optimum else "score"
            for ax, figure_name in zip(
                axes, (first, "exact_kl" if optimum else "kl", "explained_variance"), strict=True
            ):
                _panel(ax, problem, figure_name)
            if optimum:
                _level(axes[0], optimum["objective"], "optimum")
                _level(axes[1], optimum["exact_kl"], "optimum")
            axes[0].set_title(TITLES[name])
            axes[0].set_ylabel(
                "Objective: score − β KL, exact" if optimum else "Score (standard deviations)"
            )
            axes[1].set_ylabel("Sequence KL (nats)" + (", exact" if optimum else ""))
            axes[2].set_ylabel("Explained variance of the critic")
            axes[2].axhline(0, color="#666666", linewidth=0.8)
            axes[2].set_ylim(-0.55, 1.0)
            axes[1].set_ylim(bottom=min(0.0, axes[1].get_ylim()[0]))
        for ax in grid[-1]:
            ax.set_xlabel("Step (64 completions each)")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    save(figure, folder, "learning")


def _panel(ax: Axes, problem: dict[str, Any], name: str) -> None:
    """Draw each seed as a thin line, and a bold line for the mean, a running one if sampled."""
    for method, runs in _by_method(problem).items():
        if runs[0]["steps"][-1].get(name) is None:
            continue
        look = LOOKS[method]
        exact = name in runs[0]["before"] and "objective" in runs[0]["before"]
        steps = [i for i, step in enumerate(runs[0]["steps"]) if name in step]
        lines = np.array(
            [[np.nan if run["steps"][i][name] is None else run["steps"][i][name] for i in steps]
             for run in runs], dtype=float,
        )  # fmt: skip
        at = np.array(steps) + (1 if exact else 0)  # sampled before the step's updates
        if exact:
            at = np.concatenate([[0], at])
            first = np.array([[run["before"][name]] for run in runs])
            lines = np.concatenate([first, lines], axis=1)
        for line in lines:
            ax.plot(at, line, color=look["color"], linewidth=0.5, alpha=0.35)
        mean = lines.mean(axis=0)
        if not exact:
            mean = np.array([mean[max(0, i - WINDOW + 1) : i + 1].mean() for i in range(len(mean))])
        ax.plot(at, mean, label=method, linewidth=1.8, **look)
        if not exact and name in runs[0]["before"]:
            ends = [fmean(run[when][name] for run in runs) for when in ("before", "after")]
            ax.plot([0, len(steps)], ends, "o", color=look["color"], markeredgecolor="white")


def _level(ax: Axes, height: float, text: str) -> None:
    low, high = ax.get_ylim()
    ax.set_ylim(low, max(high, height + 0.08 * (high - low)))
    ax.axhline(height, color="#222222", linewidth=0.9, linestyle=(0, (1.2, 1.2)))
    ax.annotate(
        text, (1, height), (0, 2), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="bottom", fontsize=7.5,
    )  # fmt: skip


def publish(results: dict[str, Any], folder: Path, drawn: Path) -> None:
    """Write the figure and the marked part of ppo-learning.md; the text around it is kept."""
    page = folder / "ppo-learning.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    write_text(page, f"{head}{BEGIN}\n{tables(results)}\n{END}{tail}")
    with Image.open(drawn / "learning.png") as image:  # few colours: half the bytes, the same look
        few = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    with atomic_file(folder / "ppo-learning.png") as path:
        few.save(path, format="PNG", optimize=True)
