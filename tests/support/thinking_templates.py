"""Chat templates with a block for thoughts, written after the documented behaviour of families."""

# Qwen3: the switch adds an empty block to the prompt; earlier turns lose their thoughts, and a
# finished last turn has a block, which may be empty.
QWEN3 = """\
{%- for m in messages -%}
{%- set parts = m.content.split('</think>') -%}
{%- set content = parts[-1].lstrip('\\n') -%}
{%- set thoughts = (parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '') -%}
<|im_start|>{{ m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last -%}
{{ '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}"""

# DeepSeek-R1 and its distillations: no switch; the prompt opens the block; earlier turns lose their
# thoughts, and a finished turn has no block.
DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|User|>{{ m.content }}{%- endif -%}
{%- if m.role == 'assistant' -%}
<|Assistant|>{{ m.content.split('</think>')[-1] + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\\n' }}{%- endif -%}"""

# SmolLM3: the switch, or a flag in the system message, sets the mode that the header names; without
# thoughts every assistant turn gets an empty block.
SMOLLM3 = """\
{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' -%}
{%- set system = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}
{%- if '/no_think' in system -%}{%- set mode = '/no_think' -%}
{%- elif '/think' in system -%}{%- set mode = '/think' -%}{%- endif -%}
{%- set system = system.replace('/no_think', '').replace('/think', '').rstrip() -%}
{%- endif -%}
{{ '<|im_start|>system\\nReasoning Mode: ' + mode + '\\n' + system + '<|im_end|>\\n' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{%- endif -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}
{%- if mode == '/no_think' -%}{{ '<think>\\n\\n</think>\\n' }}{%- endif -%}
{{ m.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if mode == '/no_think' -%}{{ '<think>\\n\\n</think>\\n' }}{%- endif -%}
{%- endif -%}"""

TEMPLATES = {"qwen3": QWEN3, "deepseek-r1": DEEPSEEK_R1, "smollm3": SMOLLM3}
