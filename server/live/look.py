"""What the page of a run that goes on is made of: its text, its style and its script, without an outside part.

The script asks for ``status.json`` (``server.live.watched.Snapshot``) every few seconds and puts it into the page as
text, never as markup: reasons of faults are words of peers.
"""

from __future__ import annotations

import base64
import hashlib

from report.look import STYLE

OWN_STYLE = """
.head { flex-wrap: wrap; align-items: center; justify-content: flex-start; }
.head h1 { margin: 0; }
.state { font-weight: 600; border: 2px solid currentColor; border-radius: 1rem; padding: .05rem .8rem; }
.state::before, td.outcome::before { content: "\\25CF"; margin-right: .4em; font-size: .8em; }
.good { color: var(--good); } .busy { color: var(--link); } .bad { color: var(--bad); }
.bad.state::before, td.bad.outcome::before { content: "\\25B2"; }
.busy.state::before, td.busy.outcome::before { content: "\\25D4"; }
:root { --good: #1b6e3c; --bad: #a33a00; }
@media (prefers-color-scheme: dark) { :root { --good: #7fd39b; --bad: #f2a272; } }
#trouble, #lost { border-left: 4px solid var(--bad); background: var(--panel); padding: .5rem .9rem; }
progress { width: 100%; height: .9rem; accent-color: var(--link); }
#plot { width: 100%; height: 15rem; background: var(--panel); border-radius: .5rem; }
#plot svg { display: block; width: 100%; height: 100%; }
#plot text { fill: var(--ink); font-size: 12px; font-variant-numeric: tabular-nums; }
#plot .grid { stroke: var(--line); } #plot .curve { stroke: var(--link); stroke-width: 2; fill: none; }
#plot .dot { fill: var(--link); }
#clients-table table { min-width: 100%; }
tbody th { font-weight: 400; border-bottom-color: var(--line); }
th.number, td.number { padding: .3rem .4rem; }
#clients-table :is(th, td):nth-child(2) { padding-left: .9rem; }
ol.told { list-style: none; padding: 0; margin: .6rem 0 1.3rem; }
ol.told li { border-bottom: 1px solid var(--line); padding: .35rem 0; }
ol.told span { display: block; }
@media (max-width: 40rem) { .head { align-items: flex-start; } }
[hidden] { display: none !important; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
"""

SCRIPT = """
'use strict';
(function () {
  const EVERY = 2000, SELDOM = 15000, SVG = 'http://www.w3.org/2000/svg';
  const KINDS = {running: 'good', finished: 'good', answered: 'good', waiting: 'busy', starting: 'busy', asked: 'busy'};
  let last = null, said = '';
  function at(id) { return document.getElementById(id); }
  function put(id, text) { if (at(id).textContent !== text) at(id).textContent = text; }
  function el(name, text, kind) {
    const one = document.createElement(name);
    if (text !== undefined) one.textContent = text;
    if (kind) one.className = kind;
    return one;
  }
  function count(number) { return number.toLocaleString('en-GB'); }
  function bytes(number) {
    for (const unit of ['B', 'KB', 'MB']) {
      if (number < 1000) return unit === 'B' ? number + ' B' : number.toFixed(1) + ' ' + unit;
      number /= 1000;
    }
    return number.toFixed(2) + ' GB';
  }
  function span(seconds) {
    const whole = Math.round(Math.min(Math.max(seconds, 0), 1e9)), days = Math.floor(whole / 86400);
    const two = function (number) { return String(number).padStart(2, '0'); };
    const time = Math.floor(whole % 86400 / 3600) + ':' + two(Math.floor(whole % 3600 / 60)) + ':' + two(whole % 60);
    return days ? days + (days === 1 ? ' day, ' : ' days, ') + time : time;
  }
  function clock(seconds) { return seconds ? new Date(seconds * 1000).toLocaleTimeString('en-GB') : '–'; }
  function loss(value) { return value === null ? 'not finite' : value.toFixed(4); }
  function rows(id, columns, lines) {
    // Cells that are there stay, so that what is selected or read aloud is not taken away.
    const body = at(id);
    while (body.rows.length > lines.length) body.lastElementChild.remove();
    while (body.rows.length < lines.length) {
      const row = el('tr');
      columns.forEach(function (kind) {
        const cell = el(kind === 'head' ? 'th' : 'td', '', kind === 'head' ? 'number' : kind);
        if (kind === 'head') cell.scope = 'row';
        row.append(cell);
      });
      body.append(row);
    }
    lines.forEach(function (texts, i) {
      texts.forEach(function (text, j) {
        const cell = body.rows[i].cells[j];
        if (cell.textContent !== text) cell.textContent = text;
      });
    });
  }
  function show(run) {
    const goesOn = run.state === 'waiting' || run.state === 'running';
    const title = run.label || 'A federated run';
    put('title', title);
    document.title = run.state + ' ' + run.rounds_done + '/' + run.rounds + ' – ' + title;
    put('state', run.state);
    at('state').className = 'state ' + (KINDS[run.state] || 'bad');
    put('folder', run.folder);
    const trouble = [run.reason, run.what_now].filter(Boolean).join('; ');
    at('trouble').hidden = !trouble;
    put('trouble', trouble);
    at('rounds-bar').max = Math.max(run.rounds, 1);
    at('rounds-bar').value = Math.min(run.rounds_done, Math.max(run.rounds, 1));
    put('rounds', count(run.rounds_done) + ' of ' + count(run.rounds));
    put('left', run.seconds_left === null ? '–' : span(run.seconds_left));
    put('seconds', run.seconds ? span(run.seconds) : '–');
    const losses = run.losses, newest = losses.length ? losses[losses.length - 1] : null;
    put('loss', newest ? loss(newest[1]) : '–');
    put('nodes', count(run.nodes));
    put('answers', run.asked ? count(run.answers) + ' of ' + count(run.asked) : '–');
    put('up', bytes(run.bytes_up));
    put('down', bytes(run.bytes_down));
    put('num-faults', count(run.num_faults));
    put('updated', clock(run.updated));
    const ofNodes = run.node_losses.length ? run.node_losses[run.node_losses.length - 1][1] : undefined;
    put('node-loss', ofNodes === undefined ? '–' : loss(ofNodes) +
      (run.worst_client ? ', worst ' + run.worst_client : ''));
    at('node-loss').parentElement.hidden = ofNodes === undefined;
    put('h-loss', (figure(run) === run.losses ? 'Held-out loss' : 'Loss on nodes') + ' by round, nats a token');
    plot(figure(run));
    clients(run);
    faults(run);
    const news = 'Run ' + run.state + ', ' + run.rounds_done + ' of ' + run.rounds + ' rounds done' +
      (newest ? ', held-out loss ' + loss(newest[1]) : '');
    if (news !== said) put('news', said = news);
    document.documentElement.dataset.updates = String(1 + Number(document.documentElement.dataset.updates || 0));
  }
  function figure(run) { return run.losses.length ? run.losses : run.node_losses; }
  function clients(run) {
    const ended = ['finished', 'failed', 'stopped', 'dead'].includes(run.state);
    put('no-clients', run.are_secret ? 'Who takes part is drawn in secret in this run, and shown to nobody.' :
      run.clients.length ? '' : 'No client has been asked yet.');
    at('no-clients').hidden = !at('no-clients').textContent;
    at('clients-table').hidden = !run.clients.length;
    const number = 'number', columns = ['head', 'outcome', number, number, number, number, number, number];
    rows('clients', columns, run.clients.map(function (one) {
      const state = one.rests_until ? 'rests to round ' + one.rests_until : one.state;
      const answer = one.last_answer === null ? '–' :
        ended ? clock(one.last_answer) : span(run.now - one.last_answer) + ' ago';
      return [count(one.partition), state, count(one.last_round), count(one.answered) + ' of ' + count(one.asked),
        count(one.faults), answer, bytes(one.bytes_up), bytes(one.bytes_down)];
    }));
    run.clients.forEach(function (one, i) {
      at('clients').rows[i].cells[1].className = 'outcome ' + (KINDS[one.state] || 'bad');
    });
    put('more-clients', run.clients_left_out ?
      count(run.clients_left_out) + ' more clients are not shown; none of them does worse.' : '');
  }
  function faults(run) {
    const refused = Object.entries(run.refused), kinds = Object.entries(run.kinds);
    put('kinds', kinds.length ? kinds.map(function (one) { return count(one[1]) + ' ' + one[0]; }).join(', ') + '.' :
      'None: every reply that was asked for came and was used.');
    at('last-faults').hidden = !run.faults.length;
    list('faults', run.faults.map(function (one) {
      const who = one.partition === null ? '' : ', partition ' + one.partition;
      return [clock(one.time) + ', round ' + one.server_round + who + ', ' + one.kind, one.reason];
    }));
    at('refused').hidden = !refused.length;
    list('refused-nodes', refused.map(function (one) { return ['Node ' + one[0], one[1]]; }));
  }
  function list(id, pairs) {
    if (at(id).dataset.shown === JSON.stringify(pairs)) return;
    at(id).dataset.shown = JSON.stringify(pairs);
    at(id).replaceChildren(...pairs.map(function (pair) {
      const one = el('li');
      one.append(el('span', pair[0], 'note'), el('span', pair[1], 'why'));
      return one;
    }));
  }
  function plot(losses) {
    const known = losses.filter(function (one) { return one[1] !== null; });
    at('no-losses').hidden = Boolean(known.length);
    at('plot').hidden = !known.length;
    at('losses-details').hidden = !losses.length;
    const width = at('plot').clientWidth, height = at('plot').clientHeight, drawn = JSON.stringify([losses, width]);
    if (drawn === last) return;
    last = drawn;
    rows('losses', ['head', 'number'], losses.map(function (one) { return [count(one[0]), loss(one[1])]; }));
    if (known.length) draw(losses, known, width, height);
  }
  function draw(losses, known, width, height) {
    const values = known.map(function (one) { return one[1]; });
    let low = Math.min(...values), high = Math.max(...values);
    if (high - low < 1e-9) { low -= 0.5; high += 0.5; }
    const first = losses[0][0], end = Math.max(losses[losses.length - 1][0], first + 1);
    const left = 58, right = 16, top = 16, bottom = 42;
    function x(round) { return left + (round - first) / (end - first) * (width - left - right); }
    function y(value) { return top + (high - value) / (high - low) * (height - top - bottom); }
    function svg(name, attributes, text) {
      const one = document.createElementNS(SVG, name);
      Object.entries(attributes).forEach(function (pair) { one.setAttribute(pair[0], pair[1]); });
      if (text !== undefined) one.textContent = text;
      return one;
    }
    const parts = [];
    for (let i = 0; i <= 3; i++) {
      const value = low + (high - low) * i / 3;
      parts.push(svg('line', {class: 'grid', x1: left, x2: width - right, y1: y(value), y2: y(value)}));
      parts.push(svg('text', {x: left - 8, y: y(value) + 4, 'text-anchor': 'end'}, value.toFixed(3)));
    }
    const step = Math.max(1, Math.ceil((end - first) / Math.max(2, Math.floor((width - left) / 70))));
    for (let round = first; round <= end; round += step) {
      parts.push(svg('text', {x: x(round), y: height - bottom + 18, 'text-anchor': 'middle'}, String(round)));
    }
    parts.push(svg('text', {x: (left + width - right) / 2, y: height - 6, 'text-anchor': 'middle'}, 'round'));
    let path = '', draws = false;
    losses.forEach(function (one) {
      if (one[1] !== null) path += (draws ? 'L' : 'M') + x(one[0]).toFixed(1) + ' ' + y(one[1]).toFixed(1);
      draws = one[1] !== null;
    });
    parts.push(svg('path', {class: 'curve', d: path}));
    if (known.length <= 60) {
      known.forEach(function (one) {
        parts.push(svg('circle', {class: 'dot', cx: x(one[0]), cy: y(one[1]), r: 3.5}));
      });
    }
    const alt = 'Loss from ' + loss(known[0][1]) + ' after round ' + known[0][0] + ' to ' +
      loss(known[known.length - 1][1]) + ' after round ' + known[known.length - 1][0] + '.';
    const whole = svg('svg', {viewBox: '0 0 ' + width + ' ' + height, role: 'img', 'aria-label': alt});
    whole.append(...parts);
    at('plot').replaceChildren(whole);
  }
  let run = null;
  function lost(text) { at('lost').hidden = !text; put('lost', text); }
  async function ask() {
    try {
      const answer = await fetch('status.json', {cache: 'no-store', signal: AbortSignal.timeout(10000)});
      if (!answer.ok) throw new Error(String(answer.status));
      run = await answer.json();
      lost('');
      show(run);
    } catch (error) {
      if (!run || !['finished', 'failed', 'stopped', 'dead'].includes(run.state)) {
        lost('No answer since ' + (run ? clock(run.now) : 'this page was opened') + ': the process that serves this ' +
          'page has ended, or the connection to it. What is below is what it said last; python -m server.watch ' +
          'has the run from its folder.');
      }
    }
    setTimeout(ask, run && run.state === 'finished' ? SELDOM : EVERY);
  }
  window.addEventListener('resize', function () { if (run) plot(figure(run)); });
  ask();
})();
"""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE = STYLE + OWN_STYLE
POLICY = (
    f"default-src 'none'; script-src {_digest(SCRIPT)}; style-src {_digest(_STYLE)}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's Content-Security-Policy: its own script and style alone, and nothing from elsewhere."""
_FACTS = {
    "rounds": "rounds done", "left": "time left", "seconds": "time", "loss": "held-out loss",
    "node-loss": "loss on nodes", "answers": "answers in this round", "nodes": "nodes here", "up": "payloads up",
    "down": "arrays down", "num-faults": "faults", "updated": "last event at",
}  # fmt: skip
_CLIENTS = ("partition", "state", "round", "answered", "faults", "last answer", "up", "down")
_HEADS = "".join(f'<th scope="col"{"" if one == "state" else " class=number"}>{one}</th>' for one in _CLIENTS)
PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>A federated run</title>
<style>{_STYLE}</style></head><body>
<header><div class=head><h1 id="title">A federated run</h1><span id="state" class="state busy">starting</span></div>
<p class=note id="folder"></p>
<p id="trouble" hidden></p><p id="lost" role=alert hidden></p>
<noscript><p>A script asks for the state of the run; status.json beside this page has the same values.</p></noscript>
<p class=unseen id="news" aria-live="polite"></p></header>
<main>
<progress id="rounds-bar" aria-label="Rounds done" max="1" value="0"></progress>
<dl class=facts>{"".join(f'<div><dt>{name}</dt><dd id="{key}">–</dd></div>' for key, name in _FACTS.items())}</dl>
<section aria-labelledby="h-loss"><h2 id="h-loss">Held-out loss by round, nats a token</h2>
<p id="no-losses">Not evaluated yet.</p><div id="plot" hidden></div>
<details id="losses-details" hidden><summary>The values of this figure</summary><div class=wide tabindex="0" role=region
aria-label="Held-out loss by round"><table><thead><tr><th scope="col" class=number>round</th>
<th scope="col" class=number>nats a token</th></tr></thead><tbody id="losses"></tbody></table></div></details></section>
<section aria-labelledby="h-clients"><h2 id="h-clients">Clients</h2><p id="no-clients">No client has been asked yet.</p>
<div class=wide id="clients-table" tabindex="0" role=region aria-label="What each client does" hidden><table>
<thead><tr>{_HEADS}</tr></thead><tbody id="clients"></tbody></table></div>
<p class=note id="more-clients"></p></section>
<section aria-labelledby="h-faults"><h2 id="h-faults">Faults</h2><p id="kinds"></p>
<div id="last-faults" hidden><h3>The last ones, the latest first</h3><ol class=told id="faults"></ol></div>
<div id="refused" hidden><h3>Nodes that may not take part</h3><ol class=told id="refused-nodes"></ol></div></section>
</main>
<footer><p>Read only, from the event log in the run's folder. The same values are in
<a href="status.json">status.json</a>.</p></footer>
<script>{SCRIPT}</script></body></html>
"""
"""The whole page; a run is put into it by the script."""
