"""How the page looks, in light and dark, on a desk and on a phone. No font comes from elsewhere."""

FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
MONO_FONTS = ("ui-monospace", "monospace")

CSS = """
.gradio-container { width: 100%; max-width: 62rem !important; margin: 0 auto !important; }
:root { --body-text-color-subdued: var(--neutral-500); }
.dark { --body-text-color-subdued: var(--neutral-400); }
.dark { color-scheme: dark; }
#head { align-items: center; flex-wrap: nowrap; }
#title { flex: 1 1 0; min-width: max-content !important; }
#head h1 { margin: 0; font-size: 1.25rem; white-space: nowrap; }
#model { flex: 0 1 16rem; min-width: 8rem !important; }
#knows p { color: var(--body-text-color-subdued); font-size: .875rem; margin: 0; }
#chat { border: 1px solid var(--border-color-primary) !important; border-radius: .75rem; }
#chat small { color: var(--body-text-color-subdued); }
#chat small.error { color: var(--error-text-color, #b91c1c); font-size: .9rem; }
#model, #box { border: 1px solid var(--border-color-primary) !important; border-radius: .75rem; }
#chat .user { display: flex; flex-wrap: wrap; gap: .25rem; }
#chat .user > .message:not(.component) { flex: 1 0 100%; }
#chat .user > .component { width: auto; }
#chat .user-row .flex-wrap { width: fit-content; }
#chat .image-frame img { max-height: 11rem; width: auto; border-radius: .5rem; }
#chat .meta-text { display: none; }
#chat .example { border: 1px solid var(--border-color-primary); border-radius: .75rem; }
#chat .example-image-container, #chat .example-image { width: 6rem; height: 6rem; }
#chat button[title=Share], #chat button[title=Clear] { display: none; }
#chips, #actions { gap: .5rem; justify-content: flex-start; }
#chips button, #actions button { flex: 0 1 auto; padding: .35rem .75rem; border-radius: 999px; }
#chips { flex-wrap: wrap; }
@media (max-width: 640px) {
  #knows p { font-size: .75rem; }
  #chips { flex-wrap: nowrap; overflow-x: auto; }
  #chips button { flex: none; white-space: nowrap; }
  #chat .example-image-container, #chat .example-image { width: 4rem; height: 4rem; }
}
"""
