"""The style of every page: light and dark by one set of colours, system fonts, from 320 pixels up."""

from __future__ import annotations

from typing import Final

# Text on its ground has a contrast of 4.5 or more (WCAG 2 AA); tests/test_report_page.py computes it in a browser.
STYLE: Final = """
:root {
  color-scheme: light dark;
  --ground: #f4f5f2; --card: #ffffff; --sunken: #e9ece6; --line: #d5d9d0; --text: #1c211f; --soft: #57605b;
  --good: #166534; --good-soft: #e3f4e8; --bad: #b42318; --bad-soft: #fdecea; --warn: #854d0e; --warn-soft: #fdf3d7;
  --bar: #0f766e; --s0: #0f766e; --s1: #7c3aed; --s2: #c2690a; --s3: #db2777; --s4: #2563eb; --s5: #64748b;
  --s6: #4d7c0f; --s7: #9f1239; --s8: #27303f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #131716; --card: #1b2120; --sunken: #2a3230; --line: #38413e; --text: #e8ecea; --soft: #a3afaa;
    --good: #6ee79a; --good-soft: #12301f; --bad: #ff9b8f; --bad-soft: #3b1c19; --warn: #fcd34d; --warn-soft: #352a0c;
    --bar: #2dd4bf; --s0: #2dd4bf; --s1: #a78bfa; --s2: #fbbf24; --s3: #f472b6; --s4: #60a5fa; --s5: #94a3b8;
    --s6: #a3e635; --s7: #fda4af; --s8: #e2e8f0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 960px; padding: 16px; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
  overflow-wrap: anywhere;
}
body.wide { max-width: 1180px; }
h1, h2, h3, p, dl, dd, ul, figure { margin: 0; padding: 0; }
h1 { font-size: 1.3rem; line-height: 1.3; }
h2 { margin: 28px 0 10px; font-size: 1.1rem; }
h3 { margin: 16px 0 6px; font-size: 1rem; }
p + p { margin-top: 8px; }
header { margin-bottom: 14px; }
.soft, figcaption, caption, dt { color: var(--soft); }
.small { font-size: .875rem; }
.card { padding: 16px; border: 1px solid var(--line); border-radius: 12px; background: var(--card); }
.card + .card { margin-top: 12px; }
.card > p:first-child, .card > h3:first-child { margin-top: 0; }
td, th, dd, h1, code { unicode-bidi: isolate; }
ul.list { padding-left: 20px; }
ul.list li + li { margin-top: 6px; }
footer { margin: 28px 0 8px; color: var(--soft); font-size: .875rem; }

.verdict { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0 14px; border-left: 6px solid; }
.verdict .sign { width: 40px; height: 40px; }
.verdict .sign path, .verdict .sign circle { fill: none; stroke: currentColor; stroke-width: 3;
  stroke-linecap: round; }
.verdict .word { font-size: 1.5rem; font-weight: 700; line-height: 40px; }
.verdict > div > p:not(.word) { color: var(--text); }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.verdict.good { background: var(--good-soft); border-color: var(--good); }
.verdict.bad { background: var(--bad-soft); border-color: var(--bad); }
.verdict.warn { background: var(--warn-soft); border-color: var(--warn); }
.pill { display: inline-block; padding: 0 8px; border-radius: 99px; font-size: .8125rem; font-weight: 600;
  white-space: nowrap; }
.pill.good { background: var(--good-soft); } .pill.bad { background: var(--bad-soft); }
.pill.warn { background: var(--warn-soft); }
.pill.plain { background: var(--sunken); color: var(--text); font-weight: 400; }

.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 10px; margin-top: 12px; }
.tiles > div { padding: 10px 12px; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
.tiles dt { font-size: .8125rem; line-height: 1.3; }
.tiles dd { font-size: 1.125rem; font-weight: 600; }
.facts > div { display: grid; grid-template-columns: minmax(104px, 1fr) minmax(0, 3fr); gap: 12px; padding: 5px 0; }
.facts > div + div { border-top: 1px solid var(--line); }

.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 12px; background: var(--card); }
.scroll:focus-visible { outline: 3px solid var(--bar); outline-offset: 2px; }
table { width: 100%; border-collapse: separate; border-spacing: 0; font-size: .9375rem; line-height: 1.4;
  overflow-wrap: break-word; }
caption { padding: 10px 12px; text-align: left; font-size: .875rem; }
th, td { padding: 7px 12px; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { font-size: .8125rem; font-weight: 600; white-space: nowrap; vertical-align: bottom; }
thead tr + tr th { border-top: 0; padding-top: 0; color: var(--soft); }
.edge { border-left: 1px solid var(--line); }
tbody th { position: sticky; left: 0; min-width: 168px; max-width: 240px; background: var(--card);
  font-weight: 500; overflow-wrap: anywhere; hyphens: auto; }
@media (max-width: 480px) {
  table { font-size: .875rem; }
  th, td { padding: 7px 10px; }
  tbody th { min-width: 126px; max-width: 126px; }
}
tr.bad > * { background: var(--bad-soft); color: var(--text); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td.words { min-width: 120px; }
.under { display: block; color: var(--soft); font-size: .8125rem; font-weight: 400; line-height: 1.3; }
ol.keys { columns: 2 260px; margin: 12px 0 0; padding-left: 28px; font-size: .875rem; }
caption span { position: sticky; left: 12px; display: inline-block; max-width: min(calc(100vw - 64px), 1080px); }
.scroll + *, .plots + *, .small + .scroll { margin-top: 12px; }

.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 12px; }
figure { padding: 12px; border: 1px solid var(--line); border-radius: 12px; background: var(--card); }
figcaption { margin-bottom: 8px; font-size: .875rem; }
figcaption strong { display: block; color: var(--text); font-size: 1rem; font-weight: 600; }
svg { display: block; }
svg.plot { width: 100%; max-width: 440px; height: auto; font-size: 12.5px; font-variant-numeric: tabular-nums; }
.plot text { fill: var(--text); } .plot .soft { fill: var(--soft); } .plot text.bad { fill: var(--bad); }
.track { fill: var(--sunken); } .grid { stroke: var(--line); stroke-width: 1; } .limit { stroke: var(--text);
  stroke-width: 2; }
.bar.plain, .mark.plain { fill: var(--bar); } .bar.good { fill: var(--bar); }
.bar.bad, .mark.bad { fill: var(--bad); }
.mark.warn { fill: var(--card); stroke: var(--warn); stroke-width: 2; } .stem { stroke: var(--soft);
  stroke-opacity: .5; }
.stem.bad { stroke: var(--bad); } .stem.warn { stroke: var(--warn); }
.s0 { fill: var(--s0); } .s1 { fill: var(--s1); } .s2 { fill: var(--s2); }
.s3 { fill: var(--s3); } .s4 { fill: var(--s4); } .s5 { fill: var(--s5); }
.s6 { fill: var(--s6); } .s7 { fill: var(--s7); } .s8 { fill: var(--s8); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.curve.s0 { stroke: var(--s0); } .curve.s1 { stroke: var(--s1); } .curve.s2 { stroke: var(--s2); }
.curve.s3 { stroke: var(--s3); } .curve.s4 { stroke: var(--s4); } .curve.s5 { stroke: var(--s5); }
.curve.s6 { stroke: var(--s6); } .curve.s7 { stroke: var(--s7); }
.curve.s8 { stroke: var(--s8); }
.specks { fill: none; stroke: var(--bar); stroke-opacity: .6; stroke-width: 4.5; stroke-linecap: round; }
.specks.bad { stroke: var(--bad); } .specks.warn { stroke: var(--warn); stroke-opacity: 1; }
.area { fill: var(--bar); fill-opacity: .3; stroke: var(--bar); } .area.bad { fill: var(--bad); stroke: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 8px 0; list-style: none; font-size: .875rem; }
.legend li { display: flex; align-items: center; gap: 6px; }
.legend svg { flex: none; width: 14px; height: 14px; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); } details > .plots { margin-top: 10px; }
"""
