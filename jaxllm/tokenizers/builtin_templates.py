"""Chat templates for tokenizers that bring none: ChatML, the format of Llama 3, and our plain one.

The first two open the document as its tokenizer does, and write `role` and `content` of each
message; `bos_separated` writes contents alone, with `bos` and `eos` around an answer.
ChatML also writes `tools`, an assistant's `reasoning_content` between `<think>` and `</think>`, and
each of its `tool_calls` between `<tool_call>` and `</tool_call>`. Reasoning that stands in the
content is taken out of it, and all reasoning before the last user's message is left out.
"""

from collections.abc import Collection

CHATML = """\
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set last.user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools, one as JSON on each line:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- 'To call one, write <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.' }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- set content = message.content or '' %}
        {%- if message.role == 'assistant' %}
            {%- generation %}
            {%- set reasoning = message.reasoning_content or '' %}
            {%- if not reasoning and '</think>' in content %}
                {%- set parts = content.split('</think>') %}
                {%- set reasoning = parts[0].split('<think>')[-1].strip('\\n') %}
                {%- set content = parts[-1].lstrip('\\n') %}
            {%- endif %}
            {%- if reasoning and loop.index0 > last.user %}
                {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
            {%- endif %}
            {{- content }}
            {%- for call in message.tool_calls or [] %}
                {{- '\\n<tool_call>' + (call.function or call) | tojson + '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
            {%- endgeneration %}
            {{- '\\n' }}
        {%- elif message.role == 'tool' %}
            {{- '<tool_response>' + content + '</tool_response><|im_end|>\\n' }}
        {%- else %}
            {{- content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

BOS_SEPARATED = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- bos_token + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- (call.function or call) | tojson }}
        {%- endfor %}
        {{- eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- bos_token }}
{%- endif %}
"""

BUILTIN_TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "bos_separated": (BOS_SEPARATED, ()),
}
"""By name: the Jinja source, and the special tokens that turns are made of."""


def suitable_template(special_tokens: Collection[str]) -> str | None:
    """The source of the first built-in template with tokens for turns that are all there; None: of
    none."""
    sources = (
        source
        for source, needed in BUILTIN_TEMPLATES.values()
        if needed and set(needed) <= set(special_tokens)
    )
    return next(sources, None)
