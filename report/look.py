"""What every page carries: its style and its script, each without an outside part."""

from __future__ import annotations

STYLE = """
:root {
  --page: #ffffff; --panel: #f4f5f7; --ink: #1a1d21; --quiet: #565d66; --line: #c9ced6; --grid: #e3e6ea;
  --link: #1f5fa8; color-scheme: light;
}
@media (prefers-color-scheme: dark) { :root:not([data-theme="light"]) {
  --page: #14171c; --panel: #1d2127; --ink: #e8eaed; --quiet: #a4abb5; --line: #474e58; --grid: #2b3038;
  --link: #7db4f0; color-scheme: dark;
} }
:root[data-theme="dark"] {
  --page: #14171c; --panel: #1d2127; --ink: #e8eaed; --quiet: #a4abb5; --line: #474e58; --grid: #2b3038;
  --link: #7db4f0; color-scheme: dark;
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere; }
header, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.2rem; }
.head { display: flex; gap: 1rem; align-items: flex-start; justify-content: space-between; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3, figcaption, caption { font-size: 1rem; font-weight: 600; text-align: left; margin: 0 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.12rem; }
.note, footer { color: var(--quiet); font-size: .9rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: .6rem 0 0; }
button { font: inherit; font-size: .9rem; color: var(--ink); background: var(--panel); border: 1px solid var(--quiet);
  border-radius: .4rem; padding: .25rem .7rem; cursor: pointer; white-space: nowrap; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
dl.facts div { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
dl.facts dt { color: var(--quiet); font-size: .85rem; }
dl.facts dd { margin: .1rem 0 0; font-size: 1.12rem; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 1.4rem 0; }
.chart { width: 100%; min-height: 2rem; overflow: hidden; }
.chart svg { display: block; max-width: 100%; height: auto; }
.chart text { fill: var(--ink); }
.chart .role-axis-grid line { stroke: var(--grid); }
.chart .role-axis-tick line, .chart .role-axis-domain line { stroke: var(--quiet); }
.wide { overflow-x: auto; max-width: 100%; margin: .4rem 0 1.3rem; }
table { border-collapse: collapse; font-size: .92rem; overflow-wrap: normal; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; border-bottom-color: var(--quiet); vertical-align: bottom; }
td { white-space: pre-line; max-width: 34rem; overflow-wrap: break-word; }
td.number, th.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .88rem; }
details { margin: .4rem 0 1rem; }
summary { cursor: pointer; color: var(--link); padding: .15rem 0; }
footer { padding-top: 1rem; padding-bottom: 2rem; border-top: 1px solid var(--line); margin-top: 2.5rem; }
#vg-tooltip-element { background: var(--panel); color: var(--ink); border: 1px solid var(--quiet); border-radius: .4rem;
  padding: .4rem .6rem; font-size: .85rem; position: fixed; z-index: 9; pointer-events: none; visibility: hidden;
  max-width: 20rem; }
#vg-tooltip-element.visible { visibility: visible; }
#vg-tooltip-element td { border: 0; padding: .05rem .6rem .05rem 0; }
#vg-tooltip-element td.key { color: var(--quiet); }
@media (max-width: 40rem) { h1 { font-size: 1.35rem; } .head { flex-direction: column; gap: .4rem; } }
@media print {
  :root, :root[data-theme="dark"], :root:not([data-theme="light"]) {
    --page: #ffffff; --panel: #f4f5f7; --ink: #000000; --quiet: #444b54; --line: #c9ced6; --grid: #e3e6ea;
    --link: #000000; color-scheme: light;
  }
  body { font-size: 10.5pt; } button, nav { display: none; } figure, tr { break-inside: avoid; }
  h2, caption, figcaption { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 8pt; } th, td { padding-right: .45rem; }
}
"""

SCRIPT = """
'use strict';
(function () {
  const root = document.documentElement, button = document.getElementById('theme');
  const prefersDark = window.matchMedia('(prefers-color-scheme: dark)');
  function dark() { return root.dataset.theme ? root.dataset.theme === 'dark' : prefersDark.matches; }
  function name() { button.textContent = dark() ? 'Light' : 'Dark'; }
  button.addEventListener('click', function () { root.dataset.theme = dark() ? 'light' : 'dark'; name(); });
  prefersDark.addEventListener('change', name);
  button.hidden = false;
  name();
  const charts = JSON.parse(document.getElementById('charts').textContent);
  const font = 'system-ui, sans-serif';
  const config = {
    aria: false, background: null, font: font, view: {stroke: null},
    axis: {labelFontSize: 12, titleFontSize: 12, titleFontWeight: 'normal', titlePadding: 8},
    axisX: {grid: false}, axisY: {domain: false, ticks: false},
    legend: {labelFontSize: 12, titleFontSize: 12, titleFontWeight: 'normal', offset: 12}
  };
  const options = {
    mode: 'vega-lite', renderer: 'svg', actions: false, ast: true, defaultStyle: false, config: config,
    tooltip: {disableDefaultStyle: true}
  };
  const drawn = Object.keys(charts).map(function (id) {
    return vegaEmbed(document.getElementById(id), charts[id], options).catch(function (error) {
      document.getElementById(id).textContent = 'This figure could not be drawn; its values are in the table below.';
      console.error(error);
    });
  });
  Promise.all(drawn).then(function () { root.dataset.drawn = String(drawn.length); });
})();
"""
