// A page of several deployments: the one that is named in the address, or else the first, is put in place and run. Another
// one is another load of this page, so that nothing of the one before is left.

{
  const KEY = "#deployment=", chooser = document.getElementById("deployment");
  const names = [...chooser.options].map((option) => option.value);
  const named = location.hash.startsWith(KEY) ? names.indexOf(decodeURIComponent(location.hash.slice(KEY.length))) : -1;
  const place = Math.max(named, 0);
  chooser.selectedIndex = place;
  document.title = `${names[place]}: latency of speculative decoding`;
  document.querySelector("nav.chooser").after(document.querySelectorAll("template")[place].content.cloneNode(true));
  const own = document.querySelectorAll("script.own")[place].textContent, run = document.createElement("script");
  run.textContent = `"use strict";\n${own}\n${document.getElementById("shared").textContent}`;
  document.body.append(run);
  chooser.addEventListener("change", () => { location.hash = KEY + encodeURIComponent(chooser.value); });
  addEventListener("hashchange", () => { if (location.hash.startsWith(KEY)) location.reload(); });
}
