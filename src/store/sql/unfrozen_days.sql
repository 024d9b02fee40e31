-- Closed days whose table had no VACUUM (FREEZE) yet, and belongs to this role.
select d.partition, d.day
  from shardmq.day d
  join pg_catalog.pg_class c
    on c.oid = to_regclass('shardmq.' || shardmq.table_name(d.partition, d.day))
 where not d.frozen and not d.dropped and pg_has_role(c.relowner, 'usage')
 order by d.day, d.partition
 limit 32
