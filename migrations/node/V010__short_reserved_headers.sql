-- ShardMQ's own headers, which do not count towards the limit of 64 KiB, are short: a longer one does
-- count, so that nobody stores more under their names.
-- A function that the tables' checks call is replaced: no lock on any table.
create or replace function shardmq.headers_fit(headers jsonb[]) returns boolean
    language sql immutable
    return (
        select coalesce(bool_and(jsonb_typeof(h) = 'object' and
            (select coalesce(sum(octet_length(e.key) + octet_length(e.value)), 0) <= 65536
               from jsonb_each_text(case when jsonb_typeof(h) = 'object' then h else '{}' end) e
              where e.key not in ('shardmq.uid', 'shardmq.duplicate') or octet_length(e.value) > 100)), true)
          from unnest(headers) h);
