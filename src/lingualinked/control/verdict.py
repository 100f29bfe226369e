"""Whether a proposal is worth moving layers for, and why.

Knows one proposal and the policy; nothing of what has happened, nor what comes of the verdict.
"""

from __future__ import annotations

import dataclasses

from lingualinked.control.policy import RebalancePolicy
from lingualinked.control.proposal import Proposal
from lingualinked.planning.plan import Plan
from lingualinked.quantities import seconds_text

_SURE_ERRORS = 2.0  # standard errors of a speed that a gain must exceed besides


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a proposal."""

    is_worth_it: bool
    reason: str  # with the numbers
    may_change: bool = False  # time alone may change the answer


def judge(
    plan: Plan,
    proposal: Proposal,
    policy: RebalancePolicy,
    *,
    speed_error: float,
    lasts_s: float,
    is_required: bool,
    is_asked: bool,
) -> Verdict:
    """Hold a proposal against the plan in force; who asks for a move bears its cost.

    ``speed_error`` is the standard error of the speeds, as a share; what is saved is expected to be saved for ``lasts_s``.
    """
    if proposal.plan.spans == plan.spans:
        return Verdict(is_worth_it=False, reason="the plan in force is the best one")
    is_lost = plan.exact and not proposal.plan.exact
    lost = f"; exactness is lost: {proposal.plan.inexact_because}" if is_lost else ""
    step = f"a mean step would take {seconds_text(proposal.after_s)} instead of {seconds_text(proposal.before_s)}"
    if is_required:
        return Verdict(is_worth_it=True, reason=f"required: {step}{lost}")
    share = f"{step}: {100 * proposal.saved:.1f} % saved"
    if proposal.saved < policy.min_gain:
        return Verdict(is_worth_it=False, reason=f"{share}, less than min_gain={100 * policy.min_gain:g} %")
    needed = policy.min_gain + _SURE_ERRORS * speed_error
    if proposal.saved < needed and not is_asked:
        reason = f"{share}, less than the {100 * needed:.1f} % required while speeds are this uncertain"
        return Verdict(is_worth_it=False, reason=reason, may_change=True)
    gain_s = lasts_s * proposal.saved
    gain, lasts, cost = map(seconds_text, (gain_s, lasts_s, proposal.cost_s))
    figures = f"{step}: saves {gain} over the next {lasts} and costs {cost}"
    if gain_s <= policy.margin * proposal.cost_s and not is_asked:
        return Verdict(is_worth_it=False, reason=f"{figures}, times margin={policy.margin:g}", may_change=True)
    return Verdict(is_worth_it=True, reason=f"{figures}{lost}")
