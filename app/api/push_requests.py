"""Whether a push may be asked for, before anything is recorded."""

from __future__ import annotations

from pydantic import SecretStr

from app.api.services import Services
from app.core.access.api_keys import Principal, Scope
from app.core.errors import InvalidRequest
from app.core.pushes.hub_repository import HubRepository
from app.core.records.specs import PushOptions
from app.core.sources.hub_model import hub_client, own_token, refuse_offline


def check_push(
    services: Services, principal: Principal, options: PushOptions, hub_token: SecretStr | None
) -> None:
    """Raises InvalidRequest for a push without a token that may write.

    The service's own token is the operator's: with it other callers would write in the operator's name.
    """
    refuse_offline(options.repo_id)
    settings = services.settings
    token = hub_token
    if token is None and principal.allows(Scope.OPERATOR):
        token = settings.hub_token or SecretStr(own_token() or "")
    if token is None or not token.get_secret_value():
        raise InvalidRequest(
            f"a push to {options.repo_id} needs a hub token",
            code="hub_token_missing",
            remedy="send hub_token (--hub-token FILE); operators may set NIBBLE_HUB_TOKEN instead",
            param="hub_token",
        )
    with hub_client(settings.outgoing_networks, token) as client:
        HubRepository(options, client).check_token()
