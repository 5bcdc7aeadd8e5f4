"""Rules of the loss terms against each other."""

from __future__ import annotations

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity


def dominant_term(context: Context) -> list[Finding] | NotMeasured:
    """One term is nearly all of the loss."""
    shares = {key: reading for key, reading in context.measures.readings.items() if key.startswith("loss_share/")}
    measured = {key: reading for key, reading in shares.items() if isinstance(reading, Quantity)}
    if not measured:
        return NotMeasured("the share of the loss terms was not measured")
    findings = []
    for key, reading in measured.items():
        if len(measured) > 1 and reading.value is not None and reading.value > context.thresholds.dominant_term:
            term = key.split("/", 1)[1]
            evidence: tuple[Evidence, ...] = (Evidence("mean share of the loss", reading, f"loss/{term}/weighted"),)
            title = f"{term} is nearly all of the loss"
            mechanism = "A share of the loss is not a share of the gradient, which this record does not hold."
            gradient = context.reading(f"gradient_share/{term}")
            if isinstance(gradient, Quantity):
                evidence += (Evidence("median share of the gradient", gradient, f"loss_gradients/{term}/share"),)
                mechanism = "A share of the loss is not a share of the gradient, which stands beside it."
            findings.append(Finding("dominant-term", "note", title, evidence, mechanism, term=term))
    return findings
