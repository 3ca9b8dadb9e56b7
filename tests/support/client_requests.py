"""Chat requests as real clients send them, each with its status and what is in the prompt.

The fields and messages are those that the clients' own code writes: openai-python 3.57, openai-js,
litellm, LangChain, the AI SDK, lmms-eval, VLMEvalKit, guidellm, Open WebUI and others.
Prompts are those of `OwnTemplate()`, which marks the roles only.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.support.openai_bodies import IMAGE, URL

HELLO = {"role": "user", "content": "Hello"}
ASKED = "USER: Hello ASSISTANT:"
AGAIN = "USER: Hello ASSISTANT: Hi</s>USER: Hello ASSISTANT:"
AFTER_NOTHING = "USER: Hello ASSISTANT: </s>USER: Hello ASSISTANT:"
SEEN = "USER: <image>\nWhat is this? ASSISTANT:"
TEXT = {"type": "text", "text": "What is this?"}
SHOW = {"role": "user", "content": [IMAGE, TEXT]}
BARE = URL.partition(",")[2]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'},
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
TOOL_PROMPT = (
    'USER: Weather? ASSISTANT: Call of get_weather({"city":"Paris"})</s>'
    "USER: Result of get_weather: 22 degrees ASSISTANT:"
)
WEATHER = {"role": "user", "content": "Weather?"}


@dataclass(frozen=True)
class ClientRequest:
    """A request, and what becomes of it.

    Attributes:
        client: who sends it.
        what: what is special about it.
        body: the whole body.
        prompt: what the model reads; "" for a request that is refused.
        param: the field that a refusal names.
        sampling: fields of `Sampling` that must have these values.
        ignored: the fields that the header of the response names.
    """

    client: str
    what: str
    body: dict[str, Any]
    prompt: str = ""
    param: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


REQUESTS: list[ClientRequest] = []


def take(
    client: str,
    what: str,
    prompt: str,
    *messages: Any,
    sampling: dict[str, Any] | None = None,
    ignored: str = "",
    **fields: Any,
) -> None:
    """Add a request that is answered."""
    body = {"model": "talker", "messages": list(messages) or [HELLO], **fields}
    names = tuple(ignored.split())
    REQUESTS.append(ClientRequest(client, what, body, prompt, "", sampling or {}, names))


def refuse(client: str, what: str, param: str, *messages: Any, **fields: Any) -> None:
    """Add a request that is refused with status 400."""
    body = {"model": "talker", "messages": list(messages) or [HELLO], **fields}
    REQUESTS.append(ClientRequest(client, what, body, param=param))


def say(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def show(url: str, **fields: Any) -> dict[str, Any]:
    return say("user", [{"type": "image_url", "image_url": {"url": url, **fields}}, TEXT])


# --- openai-python -------------------------------------------------------------------------------
PYTHON = "openai-python"
take(PYTHON, "plain", ASKED)
take(PYTHON, "an image", SEEN, SHOW)
take(
    PYTHON,
    "a developer message",
    "Be brief. USER: Hello ASSISTANT:",
    say("developer", "Be brief."),
    HELLO,
)
take(
    PYTHON,
    "greedy and short",
    ASKED,
    temperature=0,
    max_tokens=16,
    sampling={"temperature": 0, "max_tokens": 16},
)
take(
    PYTHON, "max_completion_tokens", ASKED, max_completion_tokens=300, sampling={"max_tokens": 300}
)
take(
    PYTHON,
    "far too many tokens",
    ASKED,
    max_completion_tokens=128_000,
    sampling={"max_tokens": 128_000, "may_cut": True},
)
take(PYTHON, "reasoning effort", ASKED, reasoning_effort="minimal", ignored="reasoning_effort")
take(PYTHON, "reasoning effort of none", ASKED, reasoning_effort="none", ignored="reasoning_effort")
take(PYTHON, "verbosity", ASKED, verbosity="low", ignored="verbosity")
take(
    PYTHON,
    "a prediction",
    ASKED,
    prediction={"type": "content", "content": "x"},
    ignored="prediction",
)
take(
    PYTHON, "store and metadata", ASKED, store=True, metadata={"run": "7"}, ignored="store metadata"
)
take(
    PYTHON,
    "cache and safety",
    ASKED,
    prompt_cache_key="a",
    prompt_cache_retention="24h",
    safety_identifier="b",
    user="ann",
    ignored="prompt_cache_key prompt_cache_retention safety_identifier user",
)
take(
    PYTHON,
    "cache options",
    ASKED,
    prompt_cache_options={"mode": "explicit"},
    ignored="prompt_cache_options",
)
take(PYTHON, "moderation", ASKED, moderation={"model": "omni"}, ignored="moderation")
take(PYTHON, "service tier auto", ASKED, service_tier="auto")
take(PYTHON, "service tier default", ASKED, service_tier="default")
take(PYTHON, "modalities of text", ASKED, modalities=["text"])
take(PYTHON, "a format of text", ASKED, response_format={"type": "text"})
take(PYTHON, "logprobs", ASKED, logprobs=True, top_logprobs=2, sampling={"num_logprobs": 2})
take(
    PYTHON, "no logprobs", ASKED, logprobs=False, top_logprobs=None, sampling={"num_logprobs": None}
)
take(PYTHON, "stop as a text", ASKED, stop="\n", sampling={"stop": ("\n",)})
take(PYTHON, "stop with an empty text", ASKED, stop=[""], sampling={"stop": ()})
take(PYTHON, "an empty stop", ASKED, stop="", sampling={"stop": ()})
take(
    PYTHON,
    "top_p of zero is greedy",
    ASKED,
    top_p=0,
    temperature=0.8,
    sampling={"temperature": 0.0, "top_p": 1.0},
)
take(PYTHON, "a stream with usage", ASKED, stream=True, stream_options={"include_usage": True})
take(
    PYTHON,
    "a stream without obfuscation",
    ASKED,
    stream=True,
    stream_options={"include_obfuscation": False},
)
take(PYTHON, "detail low", SEEN, show(URL, detail="low"))
take(PYTHON, "detail original", SEEN, show(URL, detail="original"))
take(
    PYTHON,
    "text before image",
    "USER: What is this?<image>\n ASSISTANT:",
    say("user", [TEXT, IMAGE]),
)
take(
    PYTHON,
    "two images",
    "USER: <image>\n<image>\nWhat is this? ASSISTANT:",
    say("user", [IMAGE, IMAGE, TEXT]),
)
take(
    PYTHON,
    "an image in a message of its own",
    "USER: <image>\n\nWhat is this? ASSISTANT:",
    say("user", [IMAGE]),
    say("user", "What is this?"),
)
take(
    PYTHON,
    "an answer dumped with its nulls",
    AGAIN,
    HELLO,
    say(
        "assistant",
        "Hi",
        refusal=None,
        annotations=[],
        audio=None,
        function_call=None,
        tool_calls=None,
    ),
    HELLO,
)
take(
    PYTHON,
    "a refusal in history",
    "USER: Hello ASSISTANT: I cannot.</s>USER: Hello ASSISTANT:",
    HELLO,
    say("assistant", None, refusal="I cannot."),
    HELLO,
)
take(
    PYTHON,
    "a refusal part",
    "USER: Hello ASSISTANT: I cannot.</s>USER: Hello ASSISTANT:",
    HELLO,
    say("assistant", [{"type": "refusal", "refusal": "I cannot."}]),
    HELLO,
)
take(
    PYTHON,
    "a spoken answer in history",
    AFTER_NOTHING,
    HELLO,
    say("assistant", None, audio={"id": "audio_1"}),
    HELLO,
)
take(
    PYTHON,
    "a tool call and its result",
    TOOL_PROMPT,
    WEATHER,
    say("assistant", None, tool_calls=[CALL]),
    say("tool", "22 degrees", tool_call_id="call_1"),
)
take(
    PYTHON,
    "a custom tool call",
    "USER: Weather? ASSISTANT: Call of sh(ls)</s>USER: Result of sh: a.txt ASSISTANT:",
    WEATHER,
    say(
        "assistant",
        None,
        tool_calls=[{"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls"}}],
    ),
    say("tool", [{"type": "text", "text": "a.txt"}], tool_call_id="c"),
)
take(
    PYTHON,
    "a function call of old",
    "USER: Weather? ASSISTANT: Call of f({})</s>USER: Result of f: 4 ASSISTANT:",
    WEATHER,
    say("assistant", None, function_call={"name": "f", "arguments": "{}"}),
    say("function", "4", name="f"),
)
take(
    PYTHON,
    "tools that are not to be called",
    ASKED,
    tools=[TOOL],
    tool_choice="none",
    ignored="tools",
)
take(
    PYTHON,
    "no tools",
    ASKED,
    tools=[],
    tool_choice="auto",
    parallel_tool_calls=True,
    ignored="parallel_tool_calls",
)
take(PYTHON, "names", ASKED, say("user", "Hello", name="Ann"))
take(
    PYTHON,
    "a field of tomorrow",
    ASKED,
    context_management=[{"type": "compaction"}],
    ignored="context_management",
)
refuse(PYTHON, "tools", "tools", tools=[TOOL])
refuse(PYTHON, "a tool that must be called", "tool_choice", tool_choice="required")
refuse(PYTHON, "an answer as sound", "audio", audio={"voice": "alloy", "format": "wav"})
refuse(PYTHON, "modalities of sound", "modalities", modalities=["text", "audio"])
refuse(PYTHON, "a search", "web_search_options", web_search_options={})
refuse(PYTHON, "service tier flex", "service_tier", service_tier="flex")
refuse(
    PYTHON,
    "a file",
    "messages[0].content[0].type",
    say("user", [{"type": "file", "file": {"file_id": "f"}}]),
)
refuse(
    PYTHON,
    "sound",
    "messages[0].content[0].type",
    say("user", [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]),
)
refuse(PYTHON, "nothing said", "messages[0].content", say("user", ""))
refuse(PYTHON, "max_tokens of zero", "max_tokens", max_tokens=0)

# --- openai-js -----------------------------------------------------------------------------------
JS = "openai-js"
take(
    JS,
    "numbers that JavaScript does not tell apart",
    ASKED,
    max_tokens=64.0,
    n=1.0,
    seed=7.0,
    temperature=0,
    sampling={"max_tokens": 64, "seed": 7},
)
take(JS, "the largest safe integer", ASKED, max_tokens=2**53 - 1)
take(
    JS,
    "undefined became null",
    ASKED,
    **dict.fromkeys(
        (
            "max_tokens",
            "temperature",
            "top_p",
            "stop",
            "seed",
            "tools",
            "tool_choice",
            "user",
            "n",
            "response_format",
            "stream",
            "stream_options",
            "logit_bias",
            "presence_penalty",
            "metadata",
            "frequency_penalty",
            "logprobs",
            "top_logprobs",
            "service_tier",
            "reasoning_effort",
            "audio",
        )
    ),
)
take(JS, "top_k as a float", ASKED, top_k=40.0, sampling={"top_k": 40})
take(JS, "a stream", ASKED, stream=True)
take(
    JS,
    "parts with nulls",
    SEEN,
    say(
        "user",
        [
            {"type": "image_url", "image_url": {"url": URL, "detail": None}},
            {**TEXT, "annotations": None},
        ],
    ),
)
take(JS, "a null among the parts", SEEN, say("user", [IMAGE, None, TEXT]))
take(JS, "an answer without content", AFTER_NOTHING, HELLO, say("assistant", []), HELLO)
take(JS, "an answer of null", AFTER_NOTHING, HELLO, say("assistant", None), HELLO)
take(
    JS,
    "text that is null beside an image",
    "USER: <image>\n ASSISTANT:",
    say("user", [IMAGE, {"type": "text", "text": None}]),
)
take(
    JS,
    "a float as logit_bias",
    ASKED,
    logit_bias={"42": -100.0},
    sampling={"logit_bias": ((42, -100.0),)},
)
refuse(JS, "half a token", "max_tokens", max_tokens=1.5)

# --- litellm -------------------------------------------------------------------------------------
LITELLM = "litellm"
take(LITELLM, "a format on the image", SEEN, show(URL, format="image/png"))
take(
    LITELLM,
    "cache_control",
    SEEN,
    say("user", [IMAGE, {**TEXT, "cache_control": {"type": "ephemeral"}}]),
)
take(
    LITELLM,
    "cache_control on a message",
    "Be brief. USER: Hello ASSISTANT:",
    say("system", "Be brief.", cache_control={"type": "ephemeral"}),
    HELLO,
)
take(
    LITELLM,
    "an answer with provider fields",
    AGAIN,
    HELLO,
    say(
        "assistant",
        "Hi",
        provider_specific_fields={"x": 1},
        thinking_blocks=[{}],
        reasoning_content="Hm",
    ),
    HELLO,
)
take(
    LITELLM,
    "a thinking part",
    AGAIN,
    HELLO,
    say(
        "assistant",
        [{"type": "thinking", "thinking": "Hm", "signature": "s"}, {"type": "text", "text": "Hi"}],
    ),
    HELLO,
)
take(
    LITELLM,
    "a proxy's metadata",
    ASKED,
    metadata={"user_api_key": "x"},
    user="default_user_id",
    ignored="metadata user",
)
take(
    LITELLM,
    "prefix on the last answer",
    "USER: Hello ASSISTANT: Dear",
    HELLO,
    say("assistant", "Dear", prefix=True),
)
take(
    LITELLM,
    "a health check",
    "USER: Hey how's it going? ASSISTANT:",
    say("user", "Hey how's it going?"),
    max_tokens=1,
    sampling={"max_tokens": 1},
)
take(
    LITELLM,
    "extra fields of vLLM",
    ASKED,
    top_k=-1,
    repetition_penalty=1.0,
    skip_special_tokens=True,
    guided_json=None,
    guided_choice=None,
    sampling={"top_k": 0},
)
take(LITELLM, "no thinking", ASKED, thinking={"type": "disabled"}, ignored="thinking")

# --- LangChain -----------------------------------------------------------------------------------
LANGCHAIN = "LangChain"
take(
    LANGCHAIN,
    "ChatOpenAI",
    "You are helpful. USER: Hello ASSISTANT:",
    say("system", "You are helpful."),
    HELLO,
    stream=False,
    n=1,
    temperature=0.7,
)
take(
    LANGCHAIN,
    "a stream",
    ASKED,
    stream=True,
    stream_options={"include_usage": True},
    temperature=0.7,
)
take(LANGCHAIN, "an indexed part", SEEN, say("user", [IMAGE, {**TEXT, "index": 0}]))
take(
    LANGCHAIN, "a bare address", SEEN, say("user", [{"type": "image_url", "image_url": URL}, TEXT])
)
take(
    LANGCHAIN,
    "output of the Responses API in history",
    AGAIN,
    HELLO,
    say("assistant", [{"type": "output_text", "text": "Hi", "annotations": []}]),
    HELLO,
)
take(
    LANGCHAIN,
    "input of the Responses API",
    SEEN,
    say(
        "user",
        [
            {"type": "input_image", "image_url": URL, "detail": "auto"},
            {"type": "input_text", "text": "What is this?"},
        ],
    ),
)
take(
    LANGCHAIN,
    "an answer with an empty tool list",
    AGAIN,
    HELLO,
    say("assistant", "Hi", tool_calls=[]),
    HELLO,
)
take(
    LANGCHAIN,
    "a tool's result with an image",
    'USER: Weather? ASSISTANT: Call of get_weather({"city":"Paris"})</s>'
    "USER: Result of get_weather: <image>\n ASSISTANT:",
    WEATHER,
    say("assistant", "", tool_calls=[CALL]),
    say("tool", [IMAGE], tool_call_id="call_1"),
)
take(
    LANGCHAIN,
    "a result of an unknown call",
    "USER: Weather?\n22 ASSISTANT:",
    WEATHER,
    say("tool", "22", tool_call_id="?"),
)
take(
    LANGCHAIN,
    "a few-shot prompt",
    "USER: 1+1 ASSISTANT: 2</s>USER: 2+2 ASSISTANT: 4</s>USER: 3+3 ASSISTANT:",
    say("user", "1+1"),
    say("assistant", "2"),
    say("user", "2+2"),
    say("assistant", "4"),
    say("user", "3+3"),
)
take(
    LANGCHAIN,
    "only a system message",
    "USER: Write a haiku. ASSISTANT:",
    say("system", "Write a haiku."),
)
take(
    LANGCHAIN,
    "two system messages",
    "One.\nTwo. USER: Hello ASSISTANT:",
    say("system", "One."),
    say("system", "Two."),
    HELLO,
)
refuse(LANGCHAIN, "bind_tools", "tools", tools=[TOOL], tool_choice="auto")

# --- AI SDK --------------------------------------------------------------------------------------
AI_SDK = "AI SDK"
take(
    AI_SDK,
    "generateText",
    "USER: Hello ASSISTANT:",
    say("user", [{"type": "text", "text": "Hello"}]),
    temperature=0,
)
take(
    AI_SDK,
    "streamText",
    ASKED,
    stream=True,
    stream_options={"include_usage": True},
    max_tokens=1024,
)
take(AI_SDK, "an image part", SEEN, say("user", [TEXT, IMAGE][::-1]))
take(
    AI_SDK,
    "reasoning in history",
    AGAIN,
    HELLO,
    say("assistant", "Hi", reasoning_content="The user greets."),
    HELLO,
)
take(
    AI_SDK,
    "reasoning of OpenRouter",
    AGAIN,
    HELLO,
    say("assistant", "Hi", reasoning="Hm", reasoning_details=[{"type": "x"}]),
    HELLO,
)
take(
    AI_SDK,
    "generateObject",
    ASKED,
    response_format={"type": "json_object"},
    sampling={"json_schema": '{"type": "object"}'},
)
take(
    AI_SDK,
    "generateObject with a schema",
    ASKED,
    response_format={
        "type": "json_schema",
        "json_schema": {
            "name": "response",
            "description": None,
            "strict": True,
            "schema": {"type": "object"},
        },
    },
    sampling={"json_schema": '{"type": "object"}'},
)
take(AI_SDK, "a message with an id", ASKED, say("user", "Hello", id="msg_1", createdAt="now"))
take(AI_SDK, "provider options", ASKED, providerOptions={"x": {}}, ignored="providerOptions")

# --- lmms-eval -----------------------------------------------------------------------------------
LMMS = "lmms-eval"
take(
    LMMS,
    "--model openai",
    SEEN,
    SHOW,
    max_tokens=1024,
    temperature=0,
    sampling={"max_tokens": 1024, "temperature": 0},
)
take(
    LMMS,
    "a long answer",
    SEEN,
    SHOW,
    max_tokens=4096,
    temperature=0,
    sampling={"max_tokens": 4096, "may_cut": True},
)
take(
    LMMS,
    "--force_simple",
    "USER: What is this?<image>\n ASSISTANT:",
    say("user", [TEXT, IMAGE]),
    max_tokens=1024,
    temperature=0,
)
take(
    LMMS,
    "a model named like o1",
    SEEN,
    SHOW,
    response_format={"type": "text"},
    max_completion_tokens=5000,
    sampling={"max_tokens": 5000},
)
take(
    LMMS,
    "with reasoning effort",
    SEEN,
    SHOW,
    response_format={"type": "text"},
    max_completion_tokens=5000,
    reasoning_effort="medium",
    ignored="reasoning_effort",
)
take(
    LMMS,
    "interleaved",
    "USER: A: <image>\nB: <image>\nSame? ASSISTANT:",
    say(
        "user",
        [
            {"type": "text", "text": "A: "},
            IMAGE,
            {"type": "text", "text": "B: "},
            IMAGE,
            {"type": "text", "text": "Same?"},
        ],
    ),
    max_tokens=16,
    temperature=0,
)
take(
    LMMS,
    "vLLM's backend fields",
    SEEN,
    SHOW,
    max_tokens=16,
    temperature=0,
    top_p=1,
    top_k=-1,
    min_p=0.0,
    repetition_penalty=1.0,
)
take(
    LMMS,
    "a judge",
    "Grade it. USER: Hello ASSISTANT:",
    say("system", "Grade it."),
    HELLO,
    temperature=0.2,
    max_tokens=1024,
    n=1,
)
take(
    LMMS,
    "a prompt for simple evaluation of text",
    ASKED,
    max_tokens=16,
    temperature=0,
    do_sample=False,
    ignored="do_sample",
)
refuse(
    LMMS,
    "a video",
    "messages[0].content[0].type",
    say("user", [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}]),
)

# --- VLMEvalKit ----------------------------------------------------------------------------------
KIT = "VLMEvalKit"
take(
    KIT,
    "--base-url",
    SEEN,
    SHOW,
    max_tokens=32768,
    n=1,
    temperature=0.0,
    sampling={"max_tokens": 32768, "may_cut": True, "temperature": 0.0},
)
take(KIT, "LMDeployAPI", SEEN, SHOW, max_tokens=1024, n=1, temperature=0.0)
take(
    KIT,
    "a field on the image",
    SEEN,
    show(URL, max_dynamic_patch=6),
    max_tokens=1024,
    n=1,
    temperature=0.0,
)
take(KIT, "sizes on the image", SEEN, show(URL, min_pixels=784, max_pixels=50176), n=1)
take(KIT, "GPT4V", SEEN, show(URL, detail="low"), n=1, temperature=0, max_tokens=2048)
take(
    KIT,
    "a system prompt",
    f"Answer. {SEEN}",
    say("system", "Answer."),
    SHOW,
    n=1,
    temperature=0,
    max_tokens=2048,
)
take(
    KIT, "a data set's name", SEEN, SHOW, n=1, max_tokens=1024, dataset="MMBench", ignored="dataset"
)
take(
    KIT,
    "several turns",
    f"USER: Hello ASSISTANT: Hi</s>{SEEN}",
    say("user", [{"type": "text", "text": "Hello"}]),
    say("assistant", [{"type": "text", "text": "Hi"}]),
    SHOW,
    n=1,
    temperature=0,
)
take(KIT, "a JPEG in name only", SEEN, show(URL.replace("image/png", "image/jpeg")), n=1)
take(KIT, "no thinking", SEEN, SHOW, n=1, chat_template_kwargs={"enable_thinking": False})
take(
    KIT,
    "greedy by top_k",
    SEEN,
    SHOW,
    n=1,
    temperature=0.0,
    top_k=1,
    top_p=0.001,
    sampling={"top_k": 1, "top_p": 0.001},
)

# --- guidellm ------------------------------------------------------------------------------------
GUIDE = "guidellm"
USAGE = {"include_usage": True, "continuous_usage_stats": True}
take(
    GUIDE,
    "a stream",
    ASKED,
    stream=True,
    stream_options=USAGE,
    max_completion_tokens=64,
    max_tokens=64,
    ignore_eos=True,
    stop=None,
    sampling={"max_tokens": 64, "ignore_eos": True},
)
take(
    GUIDE,
    "no stream",
    ASKED,
    stream=False,
    max_completion_tokens=64,
    max_tokens=64,
    ignore_eos=True,
    stop=None,
)
take(
    GUIDE,
    "parts",
    "USER: <image>\nHello ASSISTANT:",
    say("user", [IMAGE, {"type": "text", "text": "Hello"}]),
    stream=True,
    stream_options=USAGE,
    max_tokens=8,
)
take(GUIDE, "a validation", "USER: test ASSISTANT:", say("user", "test"), max_tokens=1)
take(
    "vllm bench",
    "a stream",
    ASKED,
    stream=True,
    stream_options=USAGE,
    temperature=0.0,
    max_completion_tokens=128,
    ignore_eos=True,
)
take(
    "sglang bench",
    "a stream",
    ASKED,
    stream=True,
    max_tokens=128,
    ignore_eos=True,
    separate_reasoning=False,
    rid="r1",
    ignored="separate_reasoning rid",
)
take(
    "evalscope",
    "a stream",
    SEEN,
    SHOW,
    stream=True,
    stream_options={"include_usage": True},
    max_tokens=64,
    min_tokens=64,
    ignore_eos=True,
    sampling={"min_tokens": 64},
)
take(
    "genai-perf", "a stream", ASKED, stream=True, max_tokens=64, min_tokens=64, ignore_eos=True, n=1
)

# --- Open WebUI ----------------------------------------------------------------------------------
WEBUI = "Open WebUI"
take(WEBUI, "a chat", ASKED, stream=True, stream_options={"include_usage": True})
take(
    WEBUI,
    "a chat with what it knows",
    ASKED,
    stream=True,
    params={},
    tool_servers=[],
    features={"web_search": False},
    session_id="s",
    chat_id="c",
    id="m",
    background_tasks={"title_generation": True},
    ignored="params tool_servers features session_id chat_id id background_tasks",
)
take(
    WEBUI,
    "messages with its own fields",
    AGAIN,
    say("user", "Hello", id="1", parentId=None, childrenIds=["2"], timestamp=1),
    say("assistant", "Hi", id="2", modelName="m", done=True, usage={"total_tokens": 3}),
    say("user", "Hello", files=[]),
    stream=True,
)
take(
    WEBUI,
    "an image",
    "USER: What is this?<image>\n ASSISTANT:",
    say("user", [TEXT, {"type": "image_url", "image_url": {"url": URL}}]),
    stream=True,
)
take(
    WEBUI,
    "a title",
    "USER: Generate a title ASSISTANT:",
    say("user", "Generate a title"),
    stream=False,
    max_completion_tokens=1000,
)
take(
    WEBUI,
    "a greeting first",
    "USER:  ASSISTANT: How can I help?</s>USER: Hello ASSISTANT:",
    say("assistant", "How can I help?"),
    HELLO,
    stream=True,
)
take(
    WEBUI,
    "go on with an answer",
    "USER: Hello ASSISTANT: Once upon",
    HELLO,
    say("assistant", "Once upon"),
    stream=True,
)
take(WEBUI, "an answer that was stopped at once", ASKED, HELLO, say("assistant", ""), stream=True)
take(
    WEBUI, "a failed answer in between", "USER: Hello\nHello ASSISTANT:", HELLO, HELLO, stream=True
)
take(
    WEBUI,
    "its sliders",
    ASKED,
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.0,
    seed=0,
    frequency_penalty=0,
    repeat_penalty=1.1,
    mirostat=0,
    tfs_z=1,
    num_ctx=2048,
    ignored="repeat_penalty mirostat tfs_z num_ctx",
)
take(WEBUI, "keep_alive", ASKED, keep_alive="5m", options={}, ignored="keep_alive options")

# --- vLLM's own clients --------------------------------------------------------------------------
VLLM = "vLLM client"
NEUTRAL = {
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "bad_words": [],
    "prompt_logprobs": None,
    "add_special_tokens": False,
    "chat_template_kwargs": {},
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
    "echo": False,
    "include_stop_str_in_output": False,
    "best_of": None,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "priority": 0,
    "truncate_prompt_tokens": None,
    "return_token_ids": False,
    "structured_outputs": None,
    "allowed_token_ids": None,
    "logits_processors": None,
    "documents": None,
    "min_tokens": 0,
    "return_tokens_as_token_ids": None,
    "mm_processor_kwargs": None,
    "early_stopping": False,
    "stop_token_ids": [],
    "cache_salt": None,
    "kv_transfer_params": None,
    "vllm_xargs": None,
}
take(VLLM, "all of its defaults", ASKED, ignored="spaces_between_special_tokens", **NEUTRAL)
take(
    VLLM,
    "continue_final_message",
    "USER: Hello ASSISTANT: Dear",
    HELLO,
    say("assistant", "Dear"),
    continue_final_message=True,
    add_generation_prompt=False,
)
take(
    VLLM,
    "a prefill that ends in a space",
    "USER: Hello ASSISTANT: The answer is ",
    HELLO,
    say("assistant", "The answer is "),
    continue_final_message=True,
)
take(
    VLLM,
    "a prefill after an image",
    "USER: <image>\nWhat is this? ASSISTANT: A",
    SHOW,
    say("assistant", "A"),
    add_generation_prompt=False,
)
take(VLLM, "a request id", ASKED, request_id="r", ignored="request_id")
take(
    VLLM,
    "untyped parts",
    SEEN,
    say("user", [{"image_url": {"url": URL}}, {"text": "What is this?"}]),
)
take(VLLM, "parts that are texts", "USER: What is this? ASSISTANT:", say("user", ["What is this?"]))
take(VLLM, "a uuid", SEEN, say("user", [{**IMAGE, "uuid": "img-1"}, TEXT]))
refuse(VLLM, "beam search", "use_beam_search", use_beam_search=True)
refuse(VLLM, "a length penalty", "length_penalty", length_penalty=0.8)
refuse(VLLM, "special tokens in the answer", "skip_special_tokens", skip_special_tokens=False)
refuse(VLLM, "bad words", "bad_words", bad_words=["damn"])
refuse(VLLM, "a guided choice", "guided_choice", guided_choice=["a", "b"])
refuse(VLLM, "structured outputs", "structured_outputs", structured_outputs={"regex": "a+"})
refuse(VLLM, "prompt logprobs", "prompt_logprobs", prompt_logprobs=1)
refuse(VLLM, "priority", "priority", priority=-1)
refuse(VLLM, "a template", "chat_template", chat_template="{{ messages }}")
refuse(VLLM, "thinking", "chat_template_kwargs", chat_template_kwargs={"enable_thinking": True})
refuse(
    VLLM,
    "an answer anew after an answer",
    "continue_final_message",
    HELLO,
    say("assistant", "Dear"),
    continue_final_message=False,
)
refuse(VLLM, "nothing to continue", "continue_final_message", continue_final_message=True)
refuse(VLLM, "no generation prompt", "add_generation_prompt", add_generation_prompt=False)

# --- others --------------------------------------------------------------------------------------
take(
    "Zed",
    "a large max_tokens",
    ASKED,
    stream=True,
    max_completion_tokens=200_000,
    stop=[],
    tools=[],
    parallel_tool_calls=None,
    sampling={"may_cut": True},
)
take(
    "Zed",
    "system late",
    "USER: Hello ASSISTANT: Hi</s>USER: Be brief.\nHello ASSISTANT:",
    HELLO,
    say("assistant", "Hi"),
    say("system", "Be brief."),
    HELLO,
)
take(
    "Cline",
    "parts everywhere",
    "Be brief. USER: Hello ASSISTANT:",
    say("system", [{"type": "text", "text": "Be brief."}]),
    say("user", [{"type": "text", "text": "Hello"}]),
    stream=True,
    temperature=0,
)
take(
    "Continue",
    "a chat",
    ASKED,
    stream=True,
    max_tokens=2048,
    stop=["<|im_end|>"],
    prompt_cache_key="p",
    ignored="prompt_cache_key",
    sampling={"stop": ("<|im_end|>",)},
)
take(
    "SillyTavern",
    "a chat",
    "Be Ann. USER: [Start] ASSISTANT: Hi</s>USER: Hello\nStay in character. ASSISTANT:",
    say("system", "Be Ann."),
    say("user", "[Start]"),
    say("assistant", "Hi"),
    HELLO,
    say("system", "Stay in character."),
    temperature=1,
    top_a=0,
    stream=True,
    ignored="top_a",
)
take(
    "LibreChat",
    "a chat",
    ASKED,
    stream=True,
    user="u",
    usage={"include": True},
    ignored="user usage",
)
take(
    "Home Assistant",
    "a camera",
    "Describe. USER: What is this?<image>\n ASSISTANT:",
    say("system", "Describe."),
    say(
        "user",
        [
            TEXT,
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/jpeg;base64,{BARE}", "detail": ""},
            },
        ],
    ),
    max_tokens=100,
)
take(
    "Frigate",
    "several frames",
    "USER: Hello<image>\n<image>\n<image>\n ASSISTANT:",
    say("user", [{"type": "text", "text": "Hello"}, IMAGE, IMAGE, IMAGE]),
    timeout=60,
    ignored="timeout",
)
take("n8n", "binary", SEEN, show(URL.replace("image/png", "binary/octet-stream")))
take("Dify", "a doubled prefix", SEEN, show(f"data:image/png;base64,{URL}"))
take("ComfyUI", "no type", SEEN, show(URL.replace("image/png", "None")))
take("iOS shortcut", "an MPO", SEEN, show(URL.replace("image/png", "image/mpo")))
take(
    "curl",
    "an image said by the system",
    "Look. USER: <image>\nHello ASSISTANT:",
    say("system", [{"type": "text", "text": "Look."}, IMAGE]),
    HELLO,
)
take(
    "curl",
    "an image said by the assistant",
    "USER: Draw ASSISTANT: Here</s>USER: <image>\nWhat is this? ASSISTANT:",
    say("user", "Draw"),
    say("assistant", [{"type": "text", "text": "Here"}, IMAGE]),
    say("user", "What is this?"),
)
take(
    "curl",
    "an empty turn at first",
    "USER:  ASSISTANT: Hi</s>USER: Hello ASSISTANT:",
    say("user", ""),
    say("assistant", "Hi"),
    HELLO,
)
take("curl", "an empty system message", " USER: Hello ASSISTANT:", say("system", ""), HELLO)
take("curl", "a system message of null", ASKED, say("system", None), HELLO)
take("curl", "an empty turn before the question", ASKED, say("user", None), HELLO)
take(
    "Mistral client",
    "safe_prompt",
    ASKED,
    safe_prompt=False,
    random_seed=3,
    ignored="safe_prompt random_seed",
)
take(
    "OpenRouter client",
    "routing",
    ASKED,
    provider={"order": []},
    transforms=[],
    models=["a"],
    ignored="provider transforms models",
)
take(
    "Ollama client",
    "a call with an object",
    'USER: Weather? ASSISTANT: Call of f({"a": 1})</s>USER: Result of f: 4 ASSISTANT:',
    WEATHER,
    say("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}]),
    say("tool", "4", name="f"),
)
take(
    "Together client",
    "json_object with a schema",
    ASKED,
    response_format={"type": "json_object", "schema": {"type": "array"}},
    sampling={"json_schema": '{"type": "array"}'},
)
refuse("curl", "a misspelt role", "messages[0].role", say("usr", "Hello"))
refuse("curl", "temperature too high", "temperature", temperature=3)
refuse("curl", "a file of HEIC", "messages[0].content[0].type", say("user", [{"type": "heic"}]))
refuse(
    "Anthropic SDK",
    "an image of its own form",
    "messages[0].content[0].type",
    say(
        "user",
        [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BARE}}],
    ),
)
