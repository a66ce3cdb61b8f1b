"""How a report looks: on a laptop, on a phone, at night and on paper."""

from __future__ import annotations

_LIGHT = """
--ink:#191d26; --muted:#565d6b; --line:#dfe2e8; --grid:#eceef2; --page:#f7f8fa; --card:#ffffff; --shade:#f1f3f7;
--accent:#2f55d4; --soft:#e9eefc; --second:#c2570c; --quiet:#737a88; --warn:#fff4df; --warn-line:#e0a93b;
--c1:#2f55d4; --c2:#c2570c; --c3:#0f7b6c; --c4:#8b3fb0; --c5:#a88400; --c6:#c02a5b; --c7:#3a88b8; --c8:#6b6f7a;
"""
_DARK = """
--ink:#e8eaf0; --muted:#a2a9b8; --line:#343a46; --grid:#272c36; --page:#12151b; --card:#1a1e26; --shade:#20252f;
--accent:#8aa6ff; --soft:#232c47; --second:#f0a063; --quiet:#8b93a3; --warn:#33290f; --warn-line:#a57c25;
--c1:#8aa6ff; --c2:#f0a063; --c3:#5cc7b5; --c4:#cf9bea; --c5:#d9bd4f; --c6:#f287a8; --c7:#79c0ea; --c8:#a7abb6;
"""
STYLE = (
    ":root{color-scheme:light dark;"
    + _LIGHT
    + "}\n@media screen and (prefers-color-scheme:dark){:root{"
    + _DARK
    + """}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:1rem;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
header,.columns,footer{max-width:1240px;margin:0 auto;padding:0 2rem}
header{padding-top:2.6rem;padding-bottom:.4rem}
a{color:var(--accent);text-underline-offset:2px}
.eyebrow{margin:0 0 .3rem;color:var(--muted);font-size:.8rem;letter-spacing:.08em;text-transform:uppercase}
h1{margin:0 0 .7rem;font-size:2rem;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
.lead{max-width:62rem;margin:0 0 .5rem;font-size:1.08rem}
.lead strong{font-weight:650}
.small{color:var(--muted);font-size:.88rem;max-width:62rem}
.badge{display:inline-block;margin-left:.7rem;padding:.12rem .6rem;border-radius:1rem;background:var(--soft);
color:var(--accent);
font-size:.8rem;font-weight:600;letter-spacing:0;vertical-align:.35em}
.badge.bad{background:var(--warn);color:var(--ink)}
.warn{padding:.7rem 1rem;border-left:3px solid var(--warn-line);background:var(--warn);border-radius:0 6px 6px 0;
max-width:62rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:.9rem;margin:1.3rem 0}
.card{padding:.95rem 1.1rem;background:var(--card);border:1px solid var(--line);border-radius:10px}
.card.first{border-color:var(--accent);box-shadow:inset 0 3px 0 var(--accent)}
.card dt{color:var(--muted);font-size:.84rem}
.card dd{margin:0}
.card strong{display:block;font-size:1.75rem;font-weight:650;line-height:1.3;letter-spacing:-.02em}
.card span{color:var(--muted);font-size:.84rem}
.columns{display:grid;grid-template-columns:10.5rem minmax(0,1fr);gap:2.2rem;padding-top:1rem}
nav{position:sticky;top:1.2rem;align-self:start;font-size:.9rem}
nav ul{margin:0;padding:0;list-style:none;border-left:1px solid var(--line)}
nav a{display:block;padding:.24rem .9rem;margin-left:-1px;color:var(--muted);text-decoration:none;
border-left:1px solid transparent}
nav a:hover,nav a:focus-visible{color:var(--ink);border-left-color:var(--accent)}
main{min-width:0}
section{margin:0 0 2.6rem}
section>p{max-width:52rem}
h2{margin:0 0 .8rem;padding-bottom:.35rem;border-bottom:1px solid var(--line);font-size:1.3rem;letter-spacing:-.01em}
h3{margin:1.7rem 0 .5rem;font-size:1rem}
.charts{display:grid;gap:1rem;margin:1rem 0}
.charts.two{grid-template-columns:repeat(2,minmax(0,1fr))}
.charts.three{grid-template-columns:repeat(3,minmax(0,1fr))}
figure{display:flex;flex-direction:column;min-width:0;margin:0;padding:1rem 1.1rem .75rem;background:var(--card);
border:1px solid var(--line);border-radius:10px}
main>section>figure{margin:1rem 0}
figcaption{min-height:2.9em;margin-bottom:.5rem;color:var(--muted);font-size:.86rem;line-height:1.4}
figcaption strong{display:block;color:var(--ink);font-size:.95rem}
.plot{width:100%;min-height:60px}
.plot.vega-embed{display:block;width:100%;padding:0}
.plot svg{display:block;max-width:100%;height:auto}
details>summary{cursor:pointer;width:fit-content;color:var(--accent);font-size:.9rem}
details.data{margin-top:auto;border-top:1px solid var(--grid);padding-top:.35rem}
details.data>summary{color:var(--muted);font-size:.8rem}
details.data .scroll{max-height:18rem}
.scroll{overflow:auto;margin:.5rem 0 1rem;max-width:100%}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;min-width:min(100%,24rem);font-size:.9rem}
th,td{padding:.36rem .9rem;border-bottom:1px solid var(--grid);text-align:right;white-space:nowrap}
thead th{color:var(--muted);font-weight:500;font-size:.82rem;border-bottom-color:var(--line);vertical-align:bottom;
white-space:normal}
thead th:not(.words){min-width:4.5rem;max-width:9rem}
tbody th{font-weight:500}
th.words,td.words{text-align:left}
td.words,th.words{white-space:normal;overflow-wrap:break-word;max-width:26rem;min-width:6.5rem}
th:first-child,td:first-child{padding-left:.2rem}
tr.marked th,tr.marked td{background:var(--soft);font-weight:600}
tr.marked th:first-child{box-shadow:inset 3px 0 0 var(--accent);padding-left:.7rem}
.interval{display:block;color:var(--muted);font-weight:400;font-size:.84em}
tr.marked .interval{color:var(--ink)}
.tag{margin-left:.3rem;padding:.05rem .45rem;border-radius:1rem;border:1px solid var(--accent);color:var(--accent);
font-size:.72rem;font-weight:600;white-space:nowrap}
.bar{display:inline-block;width:5.5rem;height:.5rem;margin-right:.6rem;border-radius:3px;background:var(--grid);
overflow:hidden}
.bar span{display:block;height:100%;background:var(--accent)}
.num{display:inline-block;min-width:2.9rem}
.faces{display:flex;flex-wrap:wrap;gap:.9rem;margin:.8rem 0 1rem;padding:0;list-style:none}
.faces li{width:min-content;overflow-wrap:anywhere;font-size:.8rem;line-height:1.35;color:var(--muted)}
.faces .pair{display:flex;gap:3px;margin-bottom:.3rem}
.faces img{display:block;width:88px;height:88px;border-radius:6px;background:var(--grid);object-fit:cover}
.faces b{color:var(--ink);font-weight:550}
dl.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.35rem 1.4rem;margin:.6rem 0;max-width:58rem}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;overflow-wrap:anywhere}
code,pre{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{max-height:30rem;overflow:auto;padding:1rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
footer{padding-top:1rem;padding-bottom:2.5rem;color:var(--muted);font-size:.85rem}
#vg-tooltip-element.page-theme{padding:.45rem .65rem;background:var(--card);color:var(--ink);
border:1px solid var(--line);border-radius:6px;
box-shadow:0 4px 14px rgb(0 0 0/.16);font:12px/1.45 system-ui,sans-serif}
#vg-tooltip-element.page-theme td{padding:.05rem .3rem;border:0;white-space:normal;max-width:20rem}
#vg-tooltip-element.page-theme td.key{color:var(--muted);text-align:right}
#vg-tooltip-element.page-theme td.value{text-align:left}
#vg-tooltip-element.page-theme table{min-width:0}
@media (max-width:1100px){
.charts.three{grid-template-columns:repeat(2,minmax(0,1fr))}
}
@media (max-width:900px){
.charts.two,.charts.three{grid-template-columns:minmax(0,1fr)}
header,.columns,footer{padding-left:1.1rem;padding-right:1.1rem}
header{padding-top:1.5rem}
h1{font-size:1.55rem}
.columns{display:block}
nav{position:static;margin-bottom:1.6rem}
nav ul{display:flex;flex-wrap:wrap;gap:.1rem 1rem;border-left:0}
nav a{padding:.2rem 0;margin:0;border-left:0;text-decoration:underline;text-decoration-color:var(--line)}
.cards{grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:.6rem}
.card{padding:.7rem .8rem}
.card strong{font-size:1.35rem}
figure{padding:.8rem .7rem .6rem}
th,td{padding:.34rem .6rem}
td.words{min-width:9rem}
dl.facts{grid-template-columns:minmax(0,1fr);gap:0}
dl.facts dd{margin-bottom:.6rem}
.faces img{width:68px;height:68px}
}
@media print{
@page{margin:13mm}
:root{--page:#fff;--soft:#eef1fb}
html{font-size:11.5px}
body{font-size:11px;background:#fff}
header,.columns,footer{max-width:none;padding-left:0;padding-right:0}
header{padding-top:0}
.columns{display:block}
nav,details.data,summary{display:none}
section{margin-bottom:1.4rem}
h1{font-size:1.6rem}
h2,h3,figcaption{break-after:avoid}
figure,.card,tr,.faces li,.warn{break-inside:avoid}
.charts.two{grid-template-columns:repeat(2,minmax(0,1fr))}
.charts.three{grid-template-columns:repeat(3,minmax(0,1fr))}
.cards{grid-template-columns:repeat(auto-fit,minmax(110px,1fr))}
.card strong{font-size:1.4rem}
th,td{padding:.3rem .5rem}
.faces img{width:62px;height:62px}
figure{padding:.7rem}
.scroll{overflow:visible}
pre{max-height:none;overflow:visible;white-space:pre-wrap;font-size:.7em}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""
)
