"""Says the service's remedies in the terminal's words: options and commands in place of fields and routes."""

from __future__ import annotations

import re

# Fields of a job's body, with their section, and the options that set them.
OPTION_OF_FIELD = {
    "recipe.method": "--method",
    "recipe.scheme": "--scheme",
    "recipe.bits": "--bits",
    "recipe.group_size": "--group-size",
    "recipe.symmetric": "--symmetric",
    "recipe.rounding": "--rounding",
    "recipe.kv_cache": "--kv-cache",
    "target.max_perplexity_ratio": "--max-perplexity-ratio",
    "target.max_kl": "--target-kl",
    "target.min_recovery": "--min-recovery",
    "target.max_size": "--max-size",
    "evaluation.tasks": "--task",
    "evaluation.task_limit": "--task-limit",
    "evaluation.num_samples": "--eval-samples",
    "evaluation.sequence_length": "--eval-sequence-length",
    "calibration.num_samples": "--num-samples",
    "calibration.sequence_length": "--sequence-length",
    "calibration.dataset": "--dataset",
    "calibration.all_experts": "--all-experts",
    "webhook.url": "--webhook",
    "queue_timeout_s": "--queue-timeout",
    "timeout_s": "--timeout",
    "hub_token": "--hub-token",
    "serve_on": "--serve-on",
    "formats": "--format",
    "aliases": "--alias",
    "deploy": "--deploy",
    "force": "--force",
}
# Fields that only a file sets.
FIELDS_OF_SPEC = ("ignore", "overrides", "indivisible", "on_miss", "chat_template")
OF_SPEC = "in the file of --spec"

KEY = "set NIBBLE_API_KEY, or give --api-key, a key of this service (`nibble keys create` makes one)"
SERVED = "name a deployment that is ready; `nibble deployments` lists them"
# Remedies that are written anew, by code.
BY_CODE = {
    "api_key_missing": KEY,
    "api_key_unknown": KEY,
    "api_key_expired": KEY,
    "origin_missing": KEY,
    "invalid_cursor": "copy the `more` line at the end of the page before",
    "json_key_repeated": "name it once in the file of --spec",
    "json_invalid": "give valid JSON in the file of --spec",
    "model_missing": SERVED,
    "rate_limited": "wait a moment and try again; `nibble watch` polls less often than a loop of your own",
    "unknown_url": "use the same version of `nibble` as the service; `nibble --version` prints yours",
    "validation_failed": "correct it; the command's -h lists its options",
    "key_not_found": "list keys with `nibble keys list`",
    "server_not_found": "`nibble deployments show NAME` lists its servers",
}
ROUTES = {
    "/v1/artifacts/{id}/links": "nibble artifacts link",
    "/v1/jobs/{id}/webhook-deliveries": "nibble webhooks list JOB",
    "/v1/artifacts": "nibble artifacts",
    "/v1/deployments": "nibble deployments",
    "/v1/jobs": "nibble jobs",
    "/v1/keys": "nibble keys list",
    "/v1/models": "nibble deployments",
    "/v1/registry": "nibble registry",
    "/v1/workers": "nibble workers",
}
# What follows the name of a field where it is meant, not the word.
VALUES = r"\d|rtn|awq|gptq|omniquant|w\w+16|fp8|w8a8|nvfp4|mxfp4|nearest"
# Further words, in this order: a pattern, and what takes its place.
WORDS = (
    (r"^send it again: .* or nibble retry (--hub-token FILE)", r"`nibble retry JOB \1` brings it again"),
    (r"^send hub_token \((--hub-token FILE)\)", r"give \1"),
    (
        r"^use a key with (?:the scope )?(\w+(?::\w+)?)$",
        r"give --api-key a key with \1; with an admin's, `nibble keys create --scopes \1` makes one",
    ),
    (r"artifacts are read with GET /v1/artifacts", "`nibble artifacts download` reads artifacts"),
    (r"see /openapi\.json for the routes and their methods", BY_CODE["unknown_url"]),
    (r"send text to /v1/completions, which needs no template, or (correct the model's)", r"\1 template"),
    (r" ?\((?:nibble submit --queue-timeout|--hub-token FILE)\)", ""),
    (r"the X-Request-ID of this answer", "the service's log of this moment"),
    (r"\blabel=(\w+=\w+)", r"--label \1"),
    (r"\bsymmetric true\b", "--symmetric"),
    (r"\bsymmetric false\b", "--asymmetric"),
    (r'"evaluation": null', "--no-evaluation"),
    (r"\(PATCH, nibble tag\)", "(`nibble tag`)"),
    (rf"\b(bits|method|scheme|rounding) (?={VALUES})", r"--\1 "),
)  # fmt: skip


def in_terminal_words(code: str, remedy: str) -> str:
    """The remedy of a fault of this code, as someone at a terminal can follow it."""
    if not remedy:
        return ""
    if code in BY_CODE:
        return BY_CODE[code]
    for pattern, words in WORDS:
        remedy = re.sub(pattern, words, remedy)
    remedy = with_commands(remedy)
    for field, option in OPTION_OF_FIELD.items():
        remedy = field_pattern(field).sub(option, remedy)
    names_one = any(re.search(rf"`{name}`|\.{name}\b|\b{name} to\b", remedy) for name in FIELDS_OF_SPEC)
    return f"{remedy} ({OF_SPEC})" if names_one else remedy


def with_commands(text: str) -> str:
    """The text with commands in place of routes; a command and its own route are named once."""
    text = re.sub(r"(`nibble [a-z ]+`) and GET /v1/[\w/{}-]+ list", r"\1 lists", text)
    for route, command in ROUTES.items():
        text = re.sub(rf"\b(?:GET|POST) {re.escape(route)}(?![\w/])", f"`{command}`", text)
    return text


def with_options(text: str) -> str:
    """A message or note with options in place of fields that stand with their section, and with commands."""
    text = with_commands(text)
    for field, option in OPTION_OF_FIELD.items():
        if "." in field:
            text = re.sub(rf"(?<![\w.-]){re.escape(field)}\b(?!\.)", option, text)
    return text


def field_pattern(field: str) -> re.Pattern[str]:
    """The field with its section; alone only in backticks or with an underscore: others are prose."""
    section, _, name = field.rpartition(".")
    forms = [rf"`{name}`"]
    if section:
        forms.append(rf"(?:\b{section}\.|\bthe {section}'s ){name}\b")
    if "_" in name and section != "evaluation":
        forms.append(rf"(?<![\w.-]){name}\b")
    return re.compile("|".join(forms))
