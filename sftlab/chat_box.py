"""A box to chat with a model in a notebook: a transcript, a field to write in, and buttons to send and to forget.

python -c "from sftlab import chat_box; print(chat_box.show_transcript([{'role': 'user', 'content': '<b>?'}]))"
"""

from sftlab import chat, pages
from sftlab.options import UserError

NAMES = {"user": "you", "assistant": "model", "system": "system"}


def show_transcript(messages: list[dict]) -> str:
    """A conversation as HTML; what stands in it is shown as text, whatever it is."""
    lines = [f"<p><b>{NAMES[turn['role']]}</b> <span style='white-space:pre-wrap'>{pages.text(turn['content'])}</span></p>"
             for turn in messages]  # fmt: skip
    return f"<div aria-live='polite'>{''.join(lines)}</div>"


def make_box(model, tokenizer, **options):
    """An ipywidgets box that talks to a model; options are those of `chat.stream`. Its `messages` hold the conversation.

    An answer appears as it comes. While it comes, the buttons and the field are locked.
    """
    import ipywidgets

    transcript = ipywidgets.HTML()
    field = ipywidgets.Text(placeholder="write, then Enter or Send", description="you:", continuous_update=False)
    send, forget = ipywidgets.Button(description="Send"), ipywidgets.Button(description="Forget")
    box = ipywidgets.VBox([transcript, ipywidgets.HBox([field, send, forget])])
    box.messages, parts = [], (field, send, forget)

    def reply(_=None):
        question, field.value = field.value.strip(), ""
        if not question:
            return
        for part in parts:
            part.disabled = True
        box.messages.append({"role": "user", "content": question})
        said = {"role": "assistant", "content": ""}
        try:
            for piece in chat.stream(model, tokenizer, list(box.messages), **options):
                said["content"] += piece
                transcript.value = show_transcript([*box.messages, said])
            said["content"] = said["content"].strip()
            box.messages.append(said)
            transcript.value = show_transcript(box.messages)
        except UserError as error:
            box.messages.pop()
            transcript.value = show_transcript(box.messages) + f"<p>{pages.text(error)}</p>"
        except BaseException:
            box.messages.pop()  # a question without an answer would confuse the next one
            raise
        finally:
            for part in parts:
                part.disabled = False

    def clear(_):
        box.messages.clear()
        transcript.value = ""

    send.on_click(reply)
    field.observe(lambda change: reply() if change["new"] else None, "value")
    forget.on_click(clear)
    return box
