"""The numbers of a pair of encoders in words: what `rsa-megatron realign report` prints, and what stands on its page."""

from rsa_megatron.plots.gap_records import METHODS, STEPS, TERMS, Distance, Gap, Method, Spectrum

METHOD_NAMES = dict(zip(METHODS, ("no alignment", "mean shift", "C3", "block-wise", "ReAlign")))
STEP_NAMES = dict(zip(STEPS, ("none", "anchor", "+ trace", "+ centroid")))
TERM_NAMES = dict(zip(TERMS, "βγδζ"))


def in_words(gap: Gap) -> str:
    """All tables, and the fixed frame's figures or why they are not there."""
    counts = gap.counts
    fitted = f"fitted on {counts['fit_images']} and {counts['fit_texts']}"
    what = f"{gap.label}: {counts['num_images']} images, {counts['num_texts']} texts, D = {counts['width']}; {fitted}"
    return "\n".join([what, steps_table(gap), methods_table(gap), spectra_table(gap), frame_in_words(gap)])


def steps_table(gap: Gap) -> str:
    """The distance of the means after each step of ReAlign."""
    rows = [[STEP_NAMES[step], *lengths(distance)] for step, distance in gap.steps.items()]
    return table([f"centroid gap (s = {gap.scale:.4f})", "in-sample", "held-out", "floor"], rows)


def methods_table(gap: Gap) -> str:
    header = ["method", "in-sample", "held-out", "mixing", "JS, bits", "Φ", "Ψ", "overlap"]
    rows = [
        [
            method_name(one),
            *lengths(one.distance)[:2],
            *map(decimals, (one.mixing, one.js, one.phi, one.psi, one.overlap)),
        ]
        for one in gap.methods
    ]
    rows.append(["one cloud", "0", "", decimals(gap.chance), "0", "", "", ""])
    return table(header, rows)


def spectra_table(gap: Gap) -> str:
    spectra = {"images": gap.image_spectrum}
    spectra |= {method_name(one): one.spectrum for one in gap.methods}
    if gap.frame:
        spectra |= {"δ, in the frame": gap.frame.delta, "ζ, outside": gap.frame.zeta}
    rows = [[name, *spectrum_cells(spectrum)] for name, spectrum in spectra.items()]
    return table(["covariance of", "trace", "κ", "d_eff", "A", "exponent"], rows)


def frame_in_words(gap: Gap) -> str:
    frame = gap.frame
    if frame is None:
        return f"left out: {gap.left_out}"
    before, after = (
        ", ".join(f"{TERM_NAMES[term]} {energy:.3g}" for term, energy in budget.items())
        for budget in (frame.budget, frame.budget_after)
    )
    angle = "none" if frame.gamma_angle is None else f"{frame.gamma_angle:.1f}°"
    norm, share = (decimals(value) or "none" for value in (frame.coupling_norm, frame.coupling_r_squared))
    return (
        f"fixed frame of {frame.num_pairs} pairs: r = {frame.rank} directions hold {frame.energy:.2%}; "
        f"|m| = {frame.mean_norm:.4f}, |β| = {frame.beta_norm:.4f}, |γ| = {frame.gamma_norm:.4f}\n"
        f"energy of a pair's difference: {before}; after ReAlign: {after}\n"
        f"coupling ζ = L δ: |L| = {norm}, R² = {share}; "
        f"angle of γ and ζ's first direction: {angle}"
    )


def spectrum_cells(spectrum: Spectrum) -> list[str]:
    condition = "" if spectrum.condition_number is None else f"{spectrum.condition_number:.3g}"
    others = (spectrum.effective_dimension, spectrum.anisotropy, spectrum.exponent)
    return [decimals(spectrum.trace), condition, *("" if value is None else f"{value:.2f}" for value in others)]


def method_name(method: Method) -> str:
    return METHOD_NAMES[method.name] + ("" if method.sigma is None else f", σ = {method.sigma:g}")


def lengths(distance: Distance) -> list[str]:
    values = (distance.in_sample, distance.held_out, distance.floor)
    return [f"{value:.2e}" if value < 0.001 else f"{value:.4f}" for value in values]


def decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    first, *others = widths
    cells = [
        [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others))] for row in [header, *rows]
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)
