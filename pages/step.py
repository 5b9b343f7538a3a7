"""The picture of one training step that explain.py writes."""
from support.pictures import write_figure


def draw_step(path, columns, g, r, f, R, caption, reward):
    """The strip: a row for each frame that was drawn, from the real clip to the gradient, then its reward and its weight.
    columns: [(title, line below it, pictures (S, H, W, 3))]; g, r, f: [S]; R: the video's reward."""
    from matplotlib.figure import Figure
    S, n = len(g), len(columns)
    height = 1.1 * S + 1.05                                                   # inches, words included
    figure = Figure(figsize=(1.16 * n + 2.7, height), facecolor="white")
    axes = figure.subplots(S, n + 2, squeeze=False, width_ratios=[1] * n + [1.05, 1.05])
    figure.subplots_adjust(wspace=.05, hspace=.05, left=.055, right=.985, top=1 - .62 / height, bottom=.46 / height)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, frame in zip(axes[:, 0], g):
        axis.set_ylabel(f"frame {frame}", fontsize=9)
    for cells, (title, below, pictures) in zip(axes.T, columns):
        cells[0].set_title(f"{title}\n{below}", fontsize=9)
        for axis, picture in zip(cells, pictures):
            axis.imshow(picture, interpolation="nearest")

    bars = [(f"reward $r$\n{reward}", r, "#2456c6"), ("weight $f_i$\nEq. 7", f, "#c2570c")]
    for cells, (title, values, color) in zip(axes.T[n:], bars):
        cells[0].set_title(title, fontsize=9)
        for axis, value in zip(cells, values):
            axis.barh([0], [value], height=.32, color=color)
            axis.set(xlim=(0, 1.05 * max(1e-9, *values)), ylim=(-.6, .6))
            axis.text(0, .26, f"{value:.3g}", fontsize=9)
    figure.text(.055, .17 / height, f"“{caption[:70]}”", fontsize=10, parse_math=False)
    formula = f"$R = \\frac{{1}}{{S}}\\sum_i f_i r_i = {R:.4f}$ (Eq. 8), loss $= -R$ (Eq. 9)"
    figure.text(.985, .17 / height, formula, fontsize=10, ha="right")
    write_figure(path, figure)
