"""`/v1/recommendations`: which recipe suits a model on a device."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.dependencies import JobsReader, ServicesParam
from app.core.jobs.recommendation import Recommendation, RecommendationRequest, recommend_for

router = APIRouter(prefix="/v1/recommendations", tags=["jobs"])


@router.post("")
def recommend_recipe(
    body: RecommendationRequest, services: ServicesParam, principal: JobsReader
) -> Recommendation:
    """A recipe for a model and a device to serve it on, with alternatives and what was ruled out.

    Headers alone are read: sizes are exact but for metadata, speeds are estimates or published figures.
    """
    return recommend_for(body, services.settings)
