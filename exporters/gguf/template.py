"""The model's own query prompt as a chat template, so that stock apps ask the way the model was trained."""

from __future__ import annotations

from vlmedge.exporters.gguf.vocabulary import Vocabulary
from vlmedge.spec import Ids, Image, PromptSpec, Text

# Apps hand pictures over as parts of a list or as a marker <__media...__> inside the text, before or after the
# question; the model wants them first, so markers are cut out and put where the prompt has its picture.
_JINJA = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set ns = namespace(text='') -%}
{%- if message.content is string -%}
{%- set ns.text = message.content -%}
{%- else -%}
{%- for part in message.content -%}
{%- if part.text is string -%}{%- set ns.text = ns.text + part.text -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set before = ns.text.split('<__media')[0] -%}
{%- set after = ns.text.split('__>')[-1] -%}
{%- if '<__media' in ns.text -%}
{%- set media = ns.text[before|length:ns.text|length - after|length] -%}
{%- set question = (before + after)|trim -%}
{%- else -%}
{%- set media = '' -%}
{%- set question = ns.text|trim -%}
{%- endif -%}
{{- PROMPT -}}
{%- elif message.role == 'assistant' -%}
{{- message.content -}}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(prompt: PromptSpec, vocabulary: Vocabulary, bos: int) -> str:
    """Return the Jinja template of the skill `query`, "" where the model has none; BOS is left to the tokenizer."""
    pieces: list[str] = []
    for part in prompt.templates.get("query", ()):
        if isinstance(part, Image):
            pieces.append("media")
        elif isinstance(part, Ids):
            ids = part.ids[1:] if not pieces and part.ids[:1] == (bos,) else part.ids
            pieces.append(_quoted(vocabulary.text(ids)))
        elif isinstance(part, Text):
            before, _, after = part.text.partition("{question}")
            pieces += [_quoted(before), "question", _quoted(after)]
    pieces = [p for p in pieces if p != "''"]
    return _JINJA.replace("PROMPT", " + ".join(pieces)) if pieces else ""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
