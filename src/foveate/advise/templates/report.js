(function () {
  "use strict";
  function value(cell) {
    var text = cell.dataset.sort === undefined ? cell.textContent.trim() : cell.dataset.sort;
    if (text === "") return null;
    var number = Number(text);
    return Number.isNaN(number) ? text.toLowerCase() : number;
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      head.setAttribute("aria-sort", "none");
      head.querySelector("button").addEventListener("click", function () {
        var up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach(function (other) { other.setAttribute("aria-sort", "none"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        var body = table.tBodies[0];
        Array.from(body.rows)
          .map(function (row, place) { return { row: row, value: value(row.cells[column]), place: place }; })
          .sort(function (a, b) {
            if (a.value === null || b.value === null) {
              // Empty cells stay at the end whichever way the column is sorted.
              return (a.value === null) - (b.value === null) || a.place - b.place;
            }
            var order = a.value < b.value ? -1 : a.value > b.value ? 1 : 0;
            return (up ? order : -order) || a.place - b.place;
          })
          .forEach(function (entry) { body.appendChild(entry.row); });
      });
    });
  });
  var copy = document.getElementById("copy");
  if (copy) {
    copy.addEventListener("click", function () {
      var code = document.getElementById("code");
      var done = function () { copy.textContent = "Copied"; };
      if (navigator.clipboard && window.isSecureContext) {
        navigator.clipboard.writeText(code.textContent).then(done);
      } else {
        var range = document.createRange();
        range.selectNodeContents(code);
        var selection = window.getSelection();
        selection.removeAllRanges();
        selection.addRange(range);
        if (document.execCommand("copy")) done();
      }
    });
  }
})();
