"""The page's CSS, for light and dark mode, desktop and phone; it loads no external fonts."""

FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
MONO_FONTS = ("ui-monospace", "monospace")

CSS = """
.gradio-container { width: 100%; max-width: 62rem !important; margin: 0 auto !important; }
.gradio-container:has(#other-chat) { max-width: 90rem !important; }
:root { --body-text-color-subdued: var(--neutral-500); --error-colour: #b91c1c; }
:root { --input-placeholder-color: var(--neutral-500); --focus-colour: #0f766e; }
.dark { --body-text-color-subdued: var(--neutral-400); --error-colour: #fca5a5; }
.dark { --input-placeholder-color: var(--neutral-400); --focus-colour: #5eead4; }
.dark { color-scheme: dark; }
main.contain { gap: .6rem; }

/* A keyboard always shows where it is. */
.gradio-container :is(a, button, input, textarea, [tabindex]):focus-visible {
  outline: 2px solid var(--focus-colour) !important; outline-offset: 2px;
}
#box:focus-within { border-color: var(--focus-colour) !important; }
#box textarea:focus-visible { outline: none !important; }

#head { align-items: center; gap: .5rem .75rem; }
#title { flex: 1 1 0; min-width: max-content !important; }
#head h1 { margin: 0; font-size: 1.25rem; white-space: nowrap; }
#model, #other-model { flex: 0 1 15rem; min-width: 8rem !important; }
#model, #other-model, #box { border: 1px solid var(--border-color-primary) !important; }
#model, #other-model, #box { border-radius: .75rem; }
#reload, #double { flex: 0 0 auto; width: auto; }
#double { border: 0; padding: 0; background: none; }
#knows p, #privacy p { color: var(--body-text-color-subdued); font-size: .875rem; margin: 0; }

.chat { border: 1px solid var(--border-color-primary) !important; border-radius: .75rem; }
.chat .message, .chat .message .prose { color: var(--body-text-color); }
.chat small { color: var(--body-text-color-subdued); }
.chat small.error { color: var(--error-colour); font-size: .9rem; overflow-wrap: anywhere; }
.chat .user { display: flex; flex-wrap: wrap; gap: .25rem; }
.chat .user > .message:not(.component) { flex: 1 0 100%; }
.chat .user > .component { width: auto; }
.chat .user-row .flex-wrap { width: fit-content; }
.chat .image-frame img { max-height: 11rem; width: auto; border-radius: .5rem; }
.chat .meta-text { display: none; }
.chat .example { border: 1px solid var(--border-color-primary); border-radius: .75rem; }
.chat .example-image-container, .chat .example-image { width: 6rem; height: 6rem; }
.chat button[title=Share], .chat button[title=Clear] { display: none; }
#other-chat .user-row .component { max-width: 14rem; }

#chips, #actions, .votes { gap: .5rem; justify-content: flex-start; flex-wrap: wrap; }
#chips button, #actions button, .votes button, #reload {
  flex: 0 1 auto; padding: .35rem .75rem; border-radius: 999px;
}
#download { display: none; }
#camera video { max-height: 20rem; }

@media (max-width: 640px) {
  #title { flex-basis: 100%; }
  #model, #other-model { flex: 1 1 40%; }
  #double { flex-basis: 100%; }
  #knows p, #privacy p { font-size: .8rem; }
  .chat .examples { grid-auto-flow: column; grid-template-columns: none; overflow-x: auto; }
  #chips { flex-wrap: nowrap; overflow-x: auto; }
  #chips button { flex: none; white-space: nowrap; }
  .chat .example-image-container, .chat .example-image { width: 4rem; height: 4rem; }
}
"""
