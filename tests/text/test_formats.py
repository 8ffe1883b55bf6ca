"""Records of the usual datasets are recognised by their columns."""

import pytest

from bigmix.errors import BadInput
from bigmix.text.formats import Conversation, Dropped, Text, document_of, recognise

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def read(*records, kind=None, columns=None):
    layout = recognise(records, kind=kind, columns=columns)
    return [document_of(record, layout) for record in records]


def only(row, **options):
    return read(row, **options)[0]


@pytest.mark.parametrize("name", ["text", "content"])
def test_a_text_column_is_a_text(name):
    assert only({"id": 1, name: "Once"}) == Text(text="Once")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [USER, ASSISTANT], "id": "x"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ASSISTANT]},
        {"messages": [{**USER, "name": None, "tool_calls": None}, ASSISTANT]},
        {"instruction": "Q", "output": "A", "input": ""},
        {"instruction": "Q", "response": "A", "context": ""},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": "Q", "response": "A"},
        {"question": "Q", "answer": "A"},
        {"question": "Q", "answers": ["A", "B"]},
        {"question": "Q", "answers": {"text": ["A", "B"], "answer_start": [1, 2]}},
        {"query": "Q", "response": "A"},
        {"problem": "Q", "solution": "A"},
        {"input": "Q", "output": "A"},
    ],
)
def test_the_usual_spellings_of_a_question_and_an_answer_are_one_conversation(row):
    assert only(row) == Conversation(messages=[USER, ASSISTANT], tools=None)


def test_an_input_follows_its_instruction_and_a_context_precedes_its_question():
    alpaca = only({"instruction": "Sum up.", "input": "Long text", "output": "A"})
    squad = only({"context": "Long text", "question": "Who?", "answer": "A"})
    assert alpaca.messages[0]["content"] == "Sum up.\n\nLong text"
    assert squad.messages[0]["content"] == "Long text\n\nWho?"


def test_a_system_column_tools_and_a_history_become_part_of_the_conversation():
    tool = {"type": "function", "function": {"name": "f"}}
    row = {
        "system": "S",
        "history": [["q", "a"]],
        "prompt": "Q",
        "response": "A",
        "tools": f"[{str(tool).replace(chr(39), chr(34))}]",
    }
    document = only(row)
    assert [turn["role"][0] + turn["content"] for turn in document.messages] == [
        "sS",
        "uq",
        "aa",
        "uQ",
        "aA",
    ]
    assert document.tools == [tool]


def test_arguments_of_a_tool_call_given_as_json_become_an_object():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    document = only({"messages": [USER, turn]})
    assert document.messages[1]["content"] == ""
    assert document.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_records_that_do_not_fit_are_dropped_with_a_reason():
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c"}, {"text": " \n"}, {"text": 3}, {}]
    reasons = [each.reason for each in read(*rows) if isinstance(each, Dropped)]
    assert reasons == ["empty", "bad_row", "bad_row"]


@pytest.mark.parametrize(
    "turns",
    [
        [],
        "text",
        [{"role": "narrator", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": 3}],
    ],
)
def test_records_without_a_conversation_are_dropped(turns):
    rows = [{"messages": [USER, ASSISTANT]}] * 2 + [{"messages": turns}]
    assert read(*rows)[-1] == Dropped(reason="bad_row")


def test_a_label_next_to_a_text_is_mentioned():
    layout = recognise([{"text": "good film", "label": "pos"}], kind=None, columns=None)
    assert layout.kind == "text"
    assert layout.note is not None and "prompt=text,response=label" in layout.note


def test_records_that_could_be_of_both_kinds_are_mentioned_and_kind_decides():
    row = {"instruction": "Q", "output": "A", "text": "### Q\n### A"}
    layout = recognise([row], kind=None, columns=None)
    assert layout.kind == "chat" and layout.note is not None and "--kind text" in layout.note
    assert only(row, kind="text") == Text(text="### Q\n### A")


def test_columns_decide():
    row = {"text": "good film", "label": 1}
    asked, answered = (
        {"role": "user", "content": "good film"},
        {"role": "assistant", "content": "1"},
    )
    document = only(row, columns={"prompt": "text", "response": "label"})
    assert document == Conversation(messages=[asked, answered], tools=None)
    assert only({"body": "b"}, columns={"text": "body"}) == Text(text="b")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "a"}, "prompt and response"),
        ({"text": "a", "messages": "a"}, "text alone"),
        ({"messages": "a", "context": "a"}, "messages with system and tools"),
        ({"text": "a", "system": "a"}, "text alone"),
        ({"text": "a", "colour": "a"}, "allowed are"),
        ({"text": "missing"}, "missing"),
    ],
)
def test_columns_that_make_no_sense_are_refused(columns, message):
    with pytest.raises(BadInput, match=message):
        recognise([{"a": "x"}], kind=None, columns=columns)


def test_unknown_records_are_refused_with_their_columns():
    with pytest.raises(BadInput, match="headline, body"):
        recognise([{"headline": "h", "body": "b"}], kind=None, columns=None)


def test_a_context_is_asked_in_full_and_one_that_is_no_text_is_counted():
    row = {"question": "Who?", "answer": "A"}
    asked = only(row | {"context": ["One.", "", "Two."]})
    assert asked.messages[0]["content"] == "One.\n\nTwo.\n\nWho?"
    nested = {"title": ["T"], "sentences": [["One."]]}
    found = read(row | {"context": "One."}, row | {"context": nested})
    assert found[1] == Dropped(reason="bad_row")
    assert read(row | {"context": "One."}, row | {"context": {"text": ["One."]}})[0] == only(
        row | {"context": {"text": ["One."]}}
    )


def test_unused_choices_and_thoughts_are_mentioned():
    row = {"question": "2+2?", "choices": ["3", "4"], "answer": 1}
    assert "column 'choices' is not used" in recognise([row], kind=None, columns=None).note
    used = {"prompt": "question", "response": "answer", "context": "choices"}
    assert only(row, columns=used).messages[0]["content"] == "3\n\n4\n\n2+2?"
    thoughtful = {"messages": [USER, ASSISTANT | {"reasoning_content": "Hm."}]}
    assert (
        "put it into content to learn it" in recognise([thoughtful], kind=None, columns=None).note
    )


def test_tool_calls_are_those_that_were_made_whatever_parquet_adds():
    def calls(**turn):
        document = only({"messages": [USER, {"role": "assistant", "content": None} | turn]})
        return [call["function"] for call in document.messages[1]["tool_calls"]]

    def call(arguments):
        return [{"id": None, "type": "function", "function": {"name": "f", "arguments": arguments}}]

    assert calls(tool_calls=call({"a": 1, "b": None})) == [{"name": "f", "arguments": {"a": 1}}]
    # A null in arguments that are a text was written on purpose.
    as_text = calls(tool_calls=call('{"a": null}'))
    assert as_text == [{"name": "f", "arguments": {"a": None}}]
    assert calls(tool_calls=call("")) == [{"name": "f", "arguments": {}}]
    assert calls(function_call={"name": "f", "arguments": "{}"}) == [{"name": "f", "arguments": {}}]
    assert list(calls(tool_calls=[{"function": {"arguments": {}, "name": "f"}}])[0]) == [
        "arguments",
        "name",
    ]
    tools = [{"function": {"name": "f", "parameters": {"a": {}, "b": None}}}]
    found = only({"messages": [USER, ASSISTANT], "tools": tools}).tools
    assert found == [{"function": {"name": "f", "parameters": {"a": {}}}}]


def test_columns_of_two_spellings_in_one_file_are_both_read():
    """As parquet joins them: each record has the keys of all."""
    new = {"role": "user", "content": "Q", "from": None, "value": None}
    old = {"role": None, "content": None, "from": "gpt", "value": "A"}
    document = only({"messages": [new, old]})
    assert [turn["content"] for turn in document.messages] == ["Q", "A"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "response": "A", "history": 3},
        {"messages": [USER, ASSISTANT | {"tool_calls": True}]},
        {"messages": [USER, ASSISTANT | {"tool_calls": [3]}]},
        {"prompt": "Q", "response": "A", "context": True},
    ],
)
def test_a_record_with_a_value_of_another_type_is_counted(row):
    good = {key: value for key, value in row.items() if key in ("prompt", "response")}
    good = good or {"messages": [USER, ASSISTANT]}
    layout = recognise(
        [good | {k: v for k, v in row.items() if k != "messages"}, good], kind=None, columns=None
    )
    assert document_of(row, layout) == Dropped(reason="bad_row")
