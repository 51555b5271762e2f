"""The style sheet of `report.html`: no network, light and dark after the reader's own setting."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --soft: #5d6878; --rule: #e2e6ec; --accent: #2f6fde;
  --track: #edf0f4; --good: #1b8a4b; --bad: #c0392b; --whisker: #16305e;
  --line-1: #2f6fde; --line-2: #e07b1a; --line-3: #1b8a4b; --line-4: #9a4fc7;
  --think: #6b7280; --search-ink: #1d5fbf; --search: #e4eefc; --info-ink: #56606e; --info: #f1f3f6;
  --answer-ink: #14673a; --answer: #dff3e6; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12161c; --card: #1a2029; --ink: #e4e9f0; --soft: #97a3b4; --rule: #2b3440; --accent: #6ea3ff;
  --track: #252d38; --good: #5bd08c; --bad: #ff8275; --whisker: #dbe7ff;
  --line-1: #6ea3ff; --line-2: #f2a65a; --line-3: #5bd08c; --line-4: #c792ea;
  --think: #97a3b4; --search-ink: #9cc3ff; --search: #1c2f4d; --info-ink: #a4afbd; --info: #222a35;
  --answer-ink: #8ce0ad; --answer: #173a28; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 32px 20px 60px; }
header { margin-bottom: 22px; }
h1 { font-size: 27px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 78ch; }
header p b { color: var(--ink); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px 22px;
  margin-bottom: 18px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { padding: 7px 8px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
td { text-align: right; }
th:first-child, td:first-child, td.left, th.left { text-align: left; }
td:first-child { font-weight: 600; }
tr:last-child td { border-bottom: 0; }
tr.best td:first-child { color: var(--accent); }
td small, .range { color: var(--soft); font-size: 13px; font-weight: 400; }
.good { color: var(--good); } .bad { color: var(--bad); }
.bar { display: block; } .bar .track { fill: var(--track); } .bar .value { fill: var(--accent); opacity: .78; }
.whisker { stroke: var(--whisker); stroke-width: 1.6; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 22px 34px; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
figure svg { width: 100%; height: auto; display: block; }
.grid { stroke: var(--rule); } .tick { fill: var(--soft); font-size: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.stage { display: grid; grid-template-columns: 110px 1fr 74px; gap: 12px; align-items: center; margin: 5px 0; }
.stage div { background: var(--track); border-radius: 4px; height: 14px; }
.stage i { display: block; height: 14px; border-radius: 4px; background: var(--accent); opacity: .78; min-width: 2px; }
.stage b { text-align: right; font-weight: 500; font-variant-numeric: tabular-nums; }
.episode { border-top: 1px solid var(--rule); padding: 16px 0 8px; }
.episode h3 { font-size: 15.5px; margin: 0 0 2px; }
.episode > small { color: var(--soft); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 10px; }
@media (max-width: 760px) { .pair { grid-template-columns: 1fr; } }
.pair > div { border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; min-width: 0; }
.pair h4 { margin: 0 0 6px; font-size: 13px; font-weight: 600; display: flex; justify-content: space-between; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas,
  monospace; }
.text span { border-radius: 5px; }
.think { color: var(--think); font-style: italic; }
.search { background: var(--search); color: var(--search-ink); padding: 1px 4px; }
.answer { background: var(--answer); color: var(--answer-ink); padding: 1px 4px; font-weight: 600; }
.information { display: block; background: var(--info); color: var(--info-ink); padding: 6px 8px; margin: 5px 0;
  font-size: 12px; }
.notice { display: block; color: var(--bad); font-size: 12px; }
.key span { font-size: 13px; margin-right: 12px; border-radius: 5px; padding: 1px 6px; display: inline-block; }
.key .information { margin: 0 12px 0 0; }
details summary { cursor: pointer; font-weight: 600; } details pre { overflow-x: auto; font-size: 12.5px; }
footer { color: var(--soft); font-size: 13px; }
"""
