// The map beside the list of results. The page calls resultsMap once, `join` for each card, and `show` for each search.
"use strict";

function resultsMap(search) {
  const [section, canvas, draw, view, box, everywhere, geojson] =
    ["places", "map", "draw", "view", "bbox", "nowhere", "geojson"].map(id => document.getElementById(id));
  const plain = {color: "#1971c2", weight: 2, fillOpacity: .08}, near = {color: "#d9480f", weight: 4, fillOpacity: .3};
  section.hidden = false;
  section.parentElement.classList.add("placed");
  const map = L.map(canvas, {attributionControl: false, worldCopyJump: true, maxZoom: 22}).setView([20, 0], 2);
  L.control.scale().addTo(map);
  if (canvas.dataset.tiles !== undefined)
    L.tileLayer("/tile/{z}/{x}/{y}", {maxZoom: 22, alt: ""}).addTo(map);
  const shapes = L.featureGroup().addTo(map), limits = L.featureGroup().addTo(map);
  let byRow = new Map();

  function light(row, on) {
    const found = byRow.get(row);
    if (!found) return;
    found.shape.setStyle(on ? near : plain);
    if (on) found.shape.bringToFront();
    found.card?.classList.toggle("near", on);
  }

  function select(row) {
    const {card} = byRow.get(row);
    for (const other of byRow.keys()) light(other, other === row);
    card?.scrollIntoView({block: "nearest"});
    card?.querySelector("a").focus({preventScroll: true});
  }

  function name(hit) {
    return `${hit.rank}: ${hit.label ?? "unlabelled"}, similarity ${hit.score.toFixed(3)}`;
  }

  function outline(hit) {
    const shape = L.geoJSON(hit.place.footprint, {
      style: plain, pointToLayer: (_, place) => L.circleMarker(place, {radius: 7, ...plain}),
    });
    shape.bindTooltip(element("span", {}, name(hit)));
    shape.on("mouseover", () => light(hit.row, true));
    shape.on("mouseout", () => light(hit.row, false));
    shape.on("click", () => select(hit.row));
    shape.addTo(shapes);
    shape.eachLayer(layer => {  // so that the keyboard and screen readers reach it
      const path = layer.getElement();
      path.dataset.row = hit.row;
      for (const [key, value] of [["tabindex", 0], ["role", "button"], ["aria-label", name(hit)]])
        path.setAttribute(key, value);
      path.addEventListener("focus", () => light(hit.row, true));
      path.addEventListener("blur", () => light(hit.row, false));
      path.addEventListener("keydown", event => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        select(hit.row);
      });
    });
    return shape;
  }

  function show(hits, bbox, address) {
    shapes.clearLayers();
    limits.clearLayers();
    byRow = new Map();
    for (const hit of hits)
      if (hit.place.footprint) byRow.set(hit.row, {shape: outline(hit)});
    box.value = bbox ?? "";
    const [west, south, east, north] = (bbox ?? "").split(",").map(Number);
    if (north !== undefined && [west, south, east, north].every(Number.isFinite))
      L.rectangle([[south, west], [north, west > east ? east + 360 : east]],
        {color: "#d9480f", weight: 2, dashArray: "6 4", fill: false, interactive: false}).addTo(limits);
    geojson.hidden = address === null;
    if (address !== null) geojson.href = address;
    const seen = byRow.size ? shapes.getBounds() : limits.getLayers().length ? limits.getBounds() : null;
    if (seen) map.fitBounds(seen.pad(.1), {maxZoom: 17, animate: false});
  }

  function join(hit, card, facts) {
    const found = byRow.get(hit.row);
    found.card = card;
    for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focusin", true], ["focusout", false]])
      card.addEventListener(event, () => light(hit.row, on));
    const button = element("button", {type: "button", className: "onmap", textContent: "Show on the map"});
    button.setAttribute("aria-label", `Show result ${hit.rank} on the map`);
    button.addEventListener("click", () => {
      map.fitBounds(found.shape.getBounds().pad(1), {maxZoom: 18, animate: false});
      for (const other of byRow.keys()) light(other, other === hit.row);
    });
    facts.append(button);
  }

  function wrap(longitude) {
    return ((longitude + 180) % 360 + 360) % 360 - 180;
  }

  function searchIn(bounds) {
    const whole = bounds.getEast() - bounds.getWest() >= 360;
    const edges = [whole ? -180 : wrap(bounds.getWest()), Math.max(-90, bounds.getSouth()),
      whole ? 180 : wrap(bounds.getEast()), Math.min(90, bounds.getNorth())];
    search(edges.map(edge => +edge.toFixed(6)).join(","));
  }

  let corner = null, drawn = null;
  function drawing(on) {
    draw.setAttribute("aria-pressed", on);
    canvas.classList.toggle("drawing", on);
    map.dragging[on ? "disable" : "enable"]();
    drawn?.remove();
    corner = drawn = null;
  }
  const isDrawing = () => draw.getAttribute("aria-pressed") === "true";
  draw.addEventListener("click", () => drawing(!isDrawing()));
  map.on("mousedown", event => {
    if (!isDrawing()) return;
    corner = event.latlng;
    drawn = L.rectangle([corner, corner], {color: "#d9480f", weight: 2, interactive: false}).addTo(map);
  });
  map.on("mousemove", event => drawn?.setBounds([corner, event.latlng]));
  addEventListener("mouseup", () => {
    if (!drawn) return;
    const bounds = drawn.getBounds();
    drawing(false);
    if (bounds.getNorth() > bounds.getSouth() && bounds.getEast() > bounds.getWest()) searchIn(bounds);
  });
  addEventListener("keydown", event => {
    if (event.key === "Escape" && isDrawing()) drawing(false);
  });
  view.addEventListener("click", () => searchIn(map.getBounds()));
  box.addEventListener("keydown", event => {
    if (event.key === "Enter") search(box.value.trim());
  });
  everywhere.addEventListener("click", () => search(""));
  return {show, join};
}
