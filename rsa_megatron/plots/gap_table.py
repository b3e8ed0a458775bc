"""Formats the numbers of a pair of encoders as text: what `rsa-megatron realign report` prints, and what is on its page."""

from rsa_megatron.plots.gap_records import METHODS, STEPS, TERMS, Distance, Gap, Method, Spectrum

METHOD_NAMES = dict(zip(METHODS, ("no alignment", "mean shift", "C3", "block-wise", "ReAlign")))
STEP_NAMES = dict(zip(STEPS, ("none", "anchor", "+ trace", "+ centroid")))
TERM_NAMES = dict(zip(TERMS, "βγδζ"))


def format_summary(gap: Gap) -> str:
    """Format all tables, and the fixed frame's figures or why they are missing."""
    counts = gap.counts
    fitted = f"fitted on {counts['fit_images']} and {counts['fit_texts']}"
    what = f"{gap.label}: {counts['num_images']} images, {counts['num_texts']} texts, D = {counts['width']}; {fitted}"
    return "\n".join(
        [what, format_steps_table(gap), format_methods_table(gap), format_spectra_table(gap), format_frame(gap)]
    )


def format_steps_table(gap: Gap) -> str:
    """Format the distance of the means after each step of ReAlign."""
    rows = [[STEP_NAMES[step], *format_lengths(distance)] for step, distance in gap.steps.items()]
    return format_table([f"centroid gap (s = {gap.scale:.4f})", "in-sample", "held-out", "floor"], rows)


def format_methods_table(gap: Gap) -> str:
    header = ["method", "in-sample", "held-out", "mixing", "JS, bits", "Φ", "Ψ", "overlap"]
    rows = [
        [
            name_method(one),
            *format_lengths(one.distance)[:2],
            *map(format_decimals, (one.mixing, one.js, one.phi, one.psi, one.overlap)),
        ]
        for one in gap.methods
    ]
    rows.append(["one cloud", "0", "", format_decimals(gap.chance), "0", "", "", ""])
    return format_table(header, rows)


def format_spectra_table(gap: Gap) -> str:
    spectra = {"images": gap.image_spectrum}
    spectra |= {name_method(one): one.spectrum for one in gap.methods}
    if gap.frame:
        spectra |= {"δ, in the frame": gap.frame.delta, "ζ, outside": gap.frame.zeta}
    rows = [[name, *format_spectrum(spectrum)] for name, spectrum in spectra.items()]
    return format_table(["covariance of", "trace", "κ", "d_eff", "A", "exponent"], rows)


def format_frame(gap: Gap) -> str:
    frame = gap.frame
    if frame is None:
        return f"left out: {gap.left_out}"
    before, after = (
        ", ".join(f"{TERM_NAMES[term]} {energy:.3g}" for term, energy in budget.items())
        for budget in (frame.budget, frame.budget_after)
    )
    angle = "none" if frame.gamma_angle is None else f"{frame.gamma_angle:.1f}°"
    norm, share = (format_decimals(value) or "none" for value in (frame.coupling_norm, frame.coupling_r_squared))
    return (
        f"fixed frame of {frame.num_pairs} pairs: r = {frame.rank} directions hold {frame.energy:.2%}; "
        f"|m| = {frame.mean_norm:.4f}, |β| = {frame.beta_norm:.4f}, |γ| = {frame.gamma_norm:.4f}\n"
        f"energy of a pair's difference: {before}; after ReAlign: {after}\n"
        f"coupling ζ = L δ: |L| = {norm}, R² = {share}; "
        f"angle of γ and ζ's first direction: {angle}"
    )


def format_spectrum(spectrum: Spectrum) -> list[str]:
    condition = "" if spectrum.condition_number is None else f"{spectrum.condition_number:.3g}"
    others = (spectrum.effective_dimension, spectrum.anisotropy, spectrum.exponent)
    return [format_decimals(spectrum.trace), condition, *("" if value is None else f"{value:.2f}" for value in others)]


def name_method(method: Method) -> str:
    return METHOD_NAMES[method.name] + ("" if method.sigma is None else f", σ = {method.sigma:g}")


def format_lengths(distance: Distance) -> list[str]:
    values = (distance.in_sample, distance.held_out, distance.floor)
    return [f"{value:.2e}" if value < 0.001 else f"{value:.4f}" for value in values]


def format_decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    first, *others = widths
    cells = [
        [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others))] for row in [header, *rows]
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)
