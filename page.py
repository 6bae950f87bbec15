"""A page that shows answers with every token shaded by f, and a threshold to slide. Self-contained: loads nothing."""
import html
import math
import os
from pathlib import Path

STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 0 1rem 3rem; color: #1c1917; }
header { position: sticky; top: 0; background: #fff; padding: 0.6rem 0; border-bottom: 1px solid #d6d3d1; }
h1 { font-size: 1.1rem; margin: 0; }
label { display: flex; gap: 0.8rem; align-items: center; }
input { flex: 1; }
output { font-variant-numeric: tabular-nums; min-width: 6rem; }
article { margin: 1.5rem 0; }
.prompt { color: #57534e; white-space: pre-wrap; border-left: 3px solid #d6d3d1; padding-left: 0.8rem; }
.answer { white-space: pre-wrap; }
.answer span { border-radius: 2px; }
.answer span.above { box-shadow: inset 0 -3px #991b1b; }
.answer span.first::before { content: "\\2691"; color: #991b1b; padding-right: 0.15em; }
.verdict { font-size: 0.85rem; color: #57534e; }
"""

SCRIPT = """
const slider = document.getElementById("threshold"), debounce = Number(slider.dataset.debounce);
function show() {
  const odds = Number(slider.value), t = 1 / (1 + Math.exp(-odds));
  document.getElementById("value").textContent = t.toPrecision(4);
  let flagged = 0;
  const answers = document.querySelectorAll("article");
  for (const article of answers) {
    let first = -1, run = debounce - 1;
    article.querySelectorAll("[data-odds]").forEach((token, i) => {
      const above = Number(token.dataset.odds) > odds;
      run = above ? run + 1 : 0;
      if (run >= debounce && first < 0) first = i;
      token.classList.toggle("above", above);
      token.classList.toggle("first", above && first === i);
    });
    flagged += first >= 0;
    article.querySelector(".verdict").textContent = (first < 0 ? "no flag" : "flag raised at token " + first)
      + ", score " + article.dataset.score;
  }
  document.getElementById("count").textContent = flagged + " of " + answers.length + " answers flagged";
}
slider.addEventListener("input", show);
show();
"""


def log_odds(f):
    """log f / (1 - f), kept within 40 either way."""
    f = min(max(f, 1e-17), 1 - 1e-16)
    return max(-40.0, min(40.0, math.log(f) - math.log1p(-f)))


def token_spans(answer, tok):
    """The answer's tokens as shaded spans: the position's f at each, and one more where the answer ended by itself."""
    piece, spans = tok.stream(), []
    texts = [piece(i) for i in answer.tokens]
    if texts:
        texts[-1] += piece(None)  # half a character at the end
    texts += ["\u25a0"] * (len(answer.flag_prob) - len(texts))  # the end, or the token that was not written
    for text, f in zip(texts, answer.flag_prob):
        spans.append(f'<span data-odds="{log_odds(f)!r}" title="f = {f:.6g}" '
                     f'style="background: rgba(239, 68, 68, {min(f, 1) * 0.8:.3f})">{html.escape(text)}</span>')
    return "".join(spans)


def make_page(answers, tok, threshold, debounce=1):
    """The page of `Answer`s as text. All that comes from a user or a model is escaped."""
    articles = []
    for a in answers:
        prompt = a.prompt if isinstance(a.prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in a.prompt)
        articles.append(f'<article data-score="{a.score:.6f}"><p class="prompt" dir="auto">{html.escape(prompt)}</p>'
                        f'<p class="answer" dir="auto">{token_spans(a, tok)}</p><p class="verdict"></p></article>')
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>The red flag, token by token</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><header>'
            "<h1>Each token on a ground as red as the flag was likely in its place</h1><label>threshold"
            f'<input id="threshold" type="range" min="-40" max="40" step="any" data-debounce="{debounce}" '
            f'value="{log_odds(threshold)!r}">'
            '<output id="value"></output></label><div id="count"></div></header>'
            f'<main>{"".join(articles)}</main><script>{SCRIPT}</script></body></html>\n')


def write_page(path, answers, tok, threshold, debounce=1):
    """Writes the page to `path`, by a temporary name and a rename."""
    tmp = Path(f"{path}.tmp")
    tmp.write_text(make_page(answers, tok, threshold, debounce), encoding="utf-8")
    os.replace(tmp, path)
