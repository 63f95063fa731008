"""The rule language: from YAML, or a dict, to a `RuleSet`.

    version: 1
    architecture: [deepseek2]               # optional guard
    rules:                                  # first match wins
      - select: {role: routed_experts, layers: 3-60}
        place: {device: cpu}
      - select: {name: "token_embd.*"}      # a glob over the whole tensor name
        place: {device: cpu}

`nodes` gives values with their places, `parser` their meaning, `source` finds files and what they include,
`selection` matches rules with a model's tensors, `checks` tells what cannot be meant. The tutorial is
`rules/README.md`.
"""

from hybrid.placement.rules.rule import ExpertCacheRule, ExpertRules, KVCacheRule, Rule, RuleSet
from hybrid.placement.rules.source import AUTO, Rules, load_rules, shipped_names, shipped_text

__all__ = [
    "AUTO",
    "ExpertCacheRule",
    "ExpertRules",
    "KVCacheRule",
    "Rule",
    "RuleSet",
    "Rules",
    "load_rules",
    "shipped_names",
    "shipped_text",
]
